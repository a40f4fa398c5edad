"""What an operator can set about siglane inside any host: environment variables, as `siglane serve` names its flags."""

from __future__ import annotations

from dataclasses import dataclass, field

from siglane.families.parallel import EncoderParallel
from siglane.settings.media import MediaConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfig(MediaConfig):
    """SIGLANE_ENCODER_PARALLEL and the variables of `MediaConfig`; each host adds its own."""

    encoder_parallel: EncoderParallel = field(
        default="auto",
        metadata={"help": "of tower and projector: cut over the ranks, images divided over them, or every rank all"},
    )
