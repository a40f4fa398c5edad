"""The picture that a model reads as the most rows: what a host makes room for."""

from __future__ import annotations

from collections.abc import Iterable

from siglane.config.images import ImageFacts
from siglane.errors import UserError
from siglane.tiling.rule import ImageBudget
from siglane.types import Medium, Size, VideoSize

SIDES = tuple(round(2 ** (power / 2)) for power in range(8, 27))  # 16 to 8192 pixels
ROUNDS = 3  # of looking closer around the best so far


def largest(
    facts: ImageFacts, limits: ImageBudget, *, frames: int, most_pixels: int, most_rows: int
) -> tuple[Size, int]:
    """The size with the most rows, the smallest of several, and its rows: of pictures, or of videos of `frames` frames
    where that is not 0. most_pixels: of a picture or frame; most_rows: more are never wanted."""

    def rows(size: Size) -> int:
        medium: Medium = VideoSize(size, frames) if frames else size
        try:
            (layout,) = facts.layouts([medium], [limits])
        except UserError:
            return 0  # a shape that the model does not read
        return layout.rows if layout.rows <= most_rows else 0

    def best(sizes: Iterable[Size]) -> Size:
        allowed = {size for size in sizes if size.width * size.height <= most_pixels}
        return max(allowed, key=lambda size: (rows(size), -size.width * size.height, size))

    found = best(Size(width, height) for width in SIDES for height in SIDES)
    for closer in range(1, ROUNDS + 1):
        steps = [1 + step / 4**closer / 8 for step in range(-8, 9)]
        around = (Size(round(found.width * x), round(found.height * y)) for x in steps for y in steps)
        found = best([found, *(size for size in around if min(size) > 0)])
    return found, rows(found)
