"""Image rows into text embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from siglane.types import Prompt


class ImageRows(NamedTuple):
    """Positions `start..stop` hold rows `row..row + stop - start` of image `image`."""

    start: int
    stop: int
    image: int
    row: int

    def moved(self, places: int) -> ImageRows:
        return self._replace(start=self.start + places, stop=self.stop + places)


def image_rows(prompt: Prompt) -> tuple[ImageRows, ...]:
    """The prompt's spans, each with its first row inside its image."""
    seen = [0] * len(prompt.layouts)
    spans = []
    for start, stop, image in prompt.spans:
        spans.append(ImageRows(start, stop, image, seen[image]))
        seen[image] += stop - start
    return tuple(spans)


def splice(embeds: torch.Tensor, spans: Sequence[ImageRows], rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """embeds `[T, hidden_size]` with image rows in the places of `spans`, which are in order; gradients flow to both.

    rows: for each span all rows of its image, `[rows, hidden_size]`.
    """
    if not spans:
        return embeds
    pieces, end = [], 0
    for (start, stop, _, row), own in zip(spans, rows, strict=True):
        pieces += [embeds[end:start], own[row : row + stop - start].to(embeds.device, embeds.dtype)]
        end = stop
    return torch.cat([*pieces, embeds[end:]])
