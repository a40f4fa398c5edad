"""What an operator can set about siglane inside a host: environment variables, as `siglane serve` names its flags."""

from __future__ import annotations

from dataclasses import dataclass

from siglane.families.parallel import EncoderParallel
from siglane.settings.media import MediaConfig
from siglane.settings.options import option


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfig(MediaConfig):
    """SIGLANE_ENCODER_PARALLEL and the variables of `MediaConfig`; each host adds its own."""

    encoder_parallel: EncoderParallel = option(
        "auto", "of tower and projector: cut over the ranks, images divided over them, or every rank all"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangHostConfig(HostConfig):
    """SIGLANE_SGLANG_OVERRIDE, SIGLANE_SGLANG_VIEWS and those of `HostConfig`."""

    sglang_override: tuple[str, ...] = option(
        (), "families to take over although SGLang has its own classes for them (nvila)"
    )
    sglang_views: str | None = option(None, "folder for the views of models; default: ~/.cache/siglane/sglang")


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmHostConfig(HostConfig):
    """SIGLANE_VLLM_OVERRIDE, SIGLANE_VLLM_VIEWS and those of `HostConfig`."""

    vllm_override: tuple[str, ...] = option(
        (), "families to take over although vLLM has its own classes for them (ovis2_5)"
    )
    vllm_views: str | None = option(None, "folder for the views of models; default: ~/.cache/siglane/vllm")
