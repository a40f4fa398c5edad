"""SigLIP2 NaFlex: the whole picture at nearly its own aspect, as many patches as a budget allows (formats.md 2.2).

Source: transformers `image_processing_siglip2.py` (`get_image_size_for_max_num_patches`), which has it from big_vision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from siglane.errors import ConfigError
from siglane.tiling.rule import Budgeted, ImageBudget, ImageContext, LayoutRule, PatchGeometry, whole_tile
from siglane.types import Grid, ImageLayout, ImagePlaceholder, Resample, Size

SCALES = (1e-6, 100.0)  # the search's first interval: a picture is enlarged a hundredfold at most
PRECISION = 1e-5
MOST_PATCHES = 4096  # what detail "original" stops at: 1024 x 1024 pixels in patches of 16


@dataclass(frozen=True, slots=True, kw_only=True)
class NaFlex(LayoutRule):
    """patch_size: both sides are multiples of it; max_num_patches: a picture is scaled up or down to just fit; native:
    a picture that fits as it is keeps its size, rounded up to patches."""

    patch_size: int
    max_num_patches: int
    resample: Resample
    native: bool = False

    def __post_init__(self) -> None:
        if self.max_num_patches < 1:
            raise ConfigError(f"max_num_patches must be at least 1, got {self.max_num_patches}")

    def image(self, size: Size, geometry: PatchGeometry, context: ImageContext) -> ImageLayout:
        whole = whole_tile(self._target(size), self.resample, geometry)
        rows = geometry.projected(whole.grid)
        return ImageLayout(size, (whole,), (ImagePlaceholder(rows.area),), Grid(1, 1), projected=(rows,))

    def within(self, budget: ImageBudget) -> Budgeted:
        """`max_num_patches` replaces the checkpoint's; detail `low` is a quarter of it, `high` four times as much,
        `original` the picture's own size, up to MOST_PATCHES or `max_num_patches`."""
        budget.refuse_others("max_num_patches")
        factors = {"low": 0.25, "auto": 1, "high": 4}
        if budget.detail == "original":
            most = budget.max_num_patches or MOST_PATCHES
            return Budgeted(replace(self, max_num_patches=most, native=True), "original")
        most = max(1, int(self.max_num_patches * factors[budget.detail]))
        if budget.max_num_patches is not None:
            most = budget.max_num_patches if budget.detail == "auto" else min(most, budget.max_num_patches)
        return Budgeted(replace(self, max_num_patches=most), budget.detail)

    def _target(self, size: Size) -> Size:
        if self.native:
            own = Size(*(-(-side // self.patch_size) * self.patch_size for side in size))
            if own.width * own.height <= self.max_num_patches * self.patch_size**2:
                return own
        return fitted(size, self.patch_size, self.max_num_patches)


def fitted(size: Size, patch_size: int, max_num_patches: int) -> Size:
    """The largest scaled `size` whose sides, rounded up to patches, hold at most `max_num_patches`.

    A binary search over the scale; its lower end is taken, as in the reference, so that the last bit agrees.
    """
    low, high = SCALES
    while high - low >= PRECISION:
        middle = (low + high) / 2
        target = _scaled(size, middle, patch_size)
        if target.width * target.height <= max_num_patches * patch_size**2:
            low = middle
        else:
            high = middle
    return _scaled(size, low, patch_size)


def _scaled(size: Size, scale: float, patch_size: int) -> Size:
    return Size(*(max(patch_size, math.ceil(side * scale / patch_size) * patch_size) for side in size))
