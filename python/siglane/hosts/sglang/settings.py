"""What an operator can set about siglane inside SGLang."""

from __future__ import annotations

from dataclasses import dataclass, field

from siglane.hosts.settings import HostConfig
from siglane.settings.options import read_environment


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangConfig(HostConfig):
    """SIGLANE_SGLANG_OVERRIDE, SIGLANE_SGLANG_VIEWS and those of `HostConfig`."""

    sglang_override: tuple[str, ...] = field(
        default=(), metadata={"help": "families to take over although SGLang has its own classes for them (nvila)"}
    )
    sglang_views: str | None = field(
        default=None, metadata={"help": "folder for the views of models; default: ~/.cache/siglane/sglang"}
    )


def host_config() -> SglangConfig:
    """UserError names the variable whose value cannot be used."""
    return read_environment(SglangConfig)
