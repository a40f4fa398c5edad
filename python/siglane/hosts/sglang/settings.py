"""What an operator can set about siglane inside SGLang: environment variables, as `siglane serve` names its flags."""

from __future__ import annotations

from dataclasses import dataclass, field

from siglane.families.parallel import EncoderParallel
from siglane.settings.media import MediaConfig
from siglane.settings.options import read_environment


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfig(MediaConfig):
    """SIGLANE_ENCODER_PARALLEL, SIGLANE_SGLANG_OVERRIDE, SIGLANE_SGLANG_VIEWS and those of `MediaConfig`."""

    encoder_parallel: EncoderParallel = field(
        default="auto",
        metadata={"help": "of tower and projector: cut over the ranks, images divided over them, or every rank all"},
    )
    sglang_override: tuple[str, ...] = field(
        default=(), metadata={"help": "families to take over although SGLang has its own classes for them (nvila)"}
    )
    sglang_views: str | None = field(
        default=None, metadata={"help": "folder for the views of models; default: ~/.cache/siglane/sglang"}
    )


def host_config() -> HostConfig:
    """UserError names the variable whose value cannot be used."""
    return read_environment(HostConfig)
