"""Pictures at their own resolution: how many pixels they have at least and at most, in whole blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from siglane.errors import ConfigError, UserError
from siglane.tiling.rule import ImageBudget
from siglane.types import Detail, Size


@dataclass(frozen=True, slots=True)
class Bounds:
    """factor: what both sides are multiples of; least, most: pixels of a picture, or of a frame and of all frames
    together; limit: of one picture or frame, which a caller set beside `most`."""

    factor: int
    least: int
    most: int | None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.most is not None and not self.factor**2 <= self.most:
            raise ConfigError(f"at most {self.most} pixels are less than one block of {self.factor}x{self.factor}")

    def limited(self, found: Size, size: Size) -> Size:
        """`found`, or where a caller allows less than it what `size` is fitted to by that alone."""
        if self.limit is None or found.width * found.height <= self.limit:
            return found
        return _fitted(size, replace(self, least=0), self.limit)

    def within(self, budget: ImageBudget, *, together: bool) -> tuple[Bounds, Detail]:
        """With a caller's wishes, and the detail that is applied (`bounds_within`). together: `most` is that of several
        pictures or frames, and stays."""
        least, limit, detail = bounds_within(budget, self.factor, self.least, None)
        if together:
            return replace(self, least=least, limit=limit), detail
        least, most, detail = bounds_within(budget, self.factor, self.least, self.most)
        return replace(self, least=least, most=most, limit=limit), detail

    def upper(self, share: int) -> int | None:
        """Pixels of one of `share` that have `most` together."""
        found = [one for one in (self.most and self.most // share, self.limit) if one is not None]
        return min(found, default=None)


def bounds_within(budget: ImageBudget, factor: int, least: int, most: int | None) -> tuple[int, int | None, Detail]:
    """Pixels that a picture has at least and at most, and the detail that is applied. least, most: the checkpoint's.

    `max_pixels` and `min_pixels` replace them. Detail `low` brings the upper bound down to the lower one, `original`
    only rounds the sides, without bounds; where `max_pixels` limits it, that is `high`. UserError for bounds that leave
    no block of `factor` x `factor` pixels.
    """
    budget.refuse_others("max_pixels", "min_pixels")
    detail, block = budget.detail, factor**2
    least, most = (block, None) if detail == "original" else (least, most)
    least, most = budget.min_pixels or least, budget.max_pixels or most
    if detail == "low":
        floor = max(least, block)
        most = floor if most is None else min(floor, most)
    if detail == "original" and most is not None:
        detail = "high"
    if most is not None and most < block:
        message = f"max_pixels {most} is less than the {block} of one block of this model"
        raise UserError(message, code="invalid_budget", param="max_pixels")
    if most is not None and budget.min_pixels is None:
        least = min(least, most)
    if most is not None and most < least:
        message = f"min_pixels {least} is more than max_pixels {most}"
        raise UserError(message, code="invalid_budget", param="min_pixels")
    return least, most, detail


def fitted(size: Size, bounds: Bounds, share: int = 1, *, again: bool = False) -> Size:
    """The size a picture is resized to, one of `share` that have `most` together: multiples of the factor, about its
    aspect, between the bounds.

    Qwen2-VL's `smart_resize`, which others have taken over: rounds half to even, enlarges upwards and shrinks
    downwards; a long strip may pass `most`, but no caller's limit. again: what was shrunk is enlarged where it falls
    below the lower bound, as VideoLLaMA3's authors do.
    """
    return bounds.limited(_fitted(size, bounds, bounds.upper(share), again=again), size)


def _fitted(size: Size, bounds: Bounds, most: int | None, *, again: bool = False) -> Size:
    (width, height), factor = size, bounds.factor
    found = multiples(size, factor, lambda side: round(side / factor), fewest=0)
    if most is not None and found.width * found.height > most:
        beta = math.sqrt((height * width) / most)
        found = multiples(size, factor, lambda side: math.floor(side / beta / factor), fewest=0 if again else 1)
        if not again:
            return found
    if found.width * found.height < bounds.least:
        beta = math.sqrt(bounds.least / (height * width))
        return multiples(size, factor, lambda side: math.ceil(side * beta / factor))
    return multiples(found, factor, lambda side: side // factor)


def multiples(size: Size, factor: int, blocks: Callable[[int], int], *, fewest: int = 1) -> Size:
    """Sides of at least `fewest` whole blocks, of which `blocks` says how many a side has."""
    width, height = (max(fewest, blocks(side)) * factor for side in size)
    return Size(width, height)
