"""What a reference implementation is to `siglane verify`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image

from siglane.verify.stages import Trace


class Reference(Protocol):
    """One checkpoint, loaded."""

    def run(self, pictures: Sequence[Image.Image], prompt: str, steps: int) -> Trace:
        """The stages of one request: a user's message that shows `pictures` and then says `prompt`, and `steps`
        greedy tokens after it. Models without a language model read the pictures only."""
        ...


@dataclass(frozen=True, slots=True)
class ReferenceFamily:
    """name: as siglane calls the family; speaks: whether it has a language model; matches: whether a folder's files
    are one of its checkpoints; load: raises ConfigError or WeightError."""

    name: str
    speaks: bool
    matches: Callable[[Path], bool]
    load: Callable[[Path, torch.device, torch.dtype], Reference]
