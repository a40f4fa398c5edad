"""What a reference implementation is to `siglane verify`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image

from siglane.verify.references.decoder import Decoder
from siglane.verify.stages import Trace


class Reference(Protocol):
    """One checkpoint, loaded."""

    def run(self, pictures: Sequence[Image.Image], prompt: str, steps: int) -> Trace:
        """The stages of one request: a user's message that shows `pictures` and then says `prompt`, and `steps`
        greedy tokens after it. Models without a language model read the pictures only."""
        ...


@dataclass(frozen=True, slots=True)
class Seen:
    """What a reference makes of the pictures of one request. Nothing of it when there are none."""

    taps: Trace = field(default_factory=dict)  # the stages up to `projector`
    images: list[list[torch.Tensor]] = field(default_factory=list)  # rows of each picture, by its placeholders
    grids: list[tuple[int, int]] = field(default_factory=list)  # rows and columns of each picture's tiles or patches

    @property
    def blocks(self) -> list[torch.Tensor]:
        """The rows of all placeholders in order."""
        return [rows for image in self.images for rows in image]


class VisionLanguageReference(ABC):
    """The way from pictures and a question to an answer, each step on its own. Parameters are frozen (`ready`); to who
    makes them trainable, every step passes gradients on."""

    language: Decoder

    @abstractmethod
    def see(self, pictures: Sequence[Image.Image]) -> Seen:
        """pictures: at least one, all of one request."""

    @abstractmethod
    def text(self, prompt: str, seen: Seen) -> str:
        """The whole text of a user's message that shows the pictures and then says `prompt`."""

    @abstractmethod
    def ids(self, text: str, seen: Seen) -> list[int]:
        """Token ids of a finished `text`; PLACE where a row of a picture stands."""

    def embeds(self, text: str, seen: Seen) -> torch.Tensor:
        """What the language model reads, `[T, hidden_size]`."""
        return self.language.spliced(self.ids(text, seen), seen.blocks)

    def run(self, pictures: Sequence[Image.Image], prompt: str, steps: int) -> Trace:
        """As of `Reference`."""
        seen = self.see(pictures)
        return {**seen.taps, **self.language.run(self.embeds(self.text(prompt, seen), seen), steps)}


@dataclass(frozen=True, slots=True)
class ReferenceFamily:
    """name: as siglane calls the family; speaks: whether it has a language model; matches: whether a folder's files
    are one of its checkpoints; load: its last argument is an adapter's folder, where it lies elsewhere than the
    weights; raises ConfigError or WeightError."""

    name: str
    speaks: bool
    matches: Callable[[Path], bool]
    load: Callable[[Path, torch.device, torch.dtype, Path | None], Reference]
