"""Native resolution: one tile of the whole picture, its sides multiples of a factor, its pixels within bounds
(formats.md 3.2).

Source: AIDC-AI/Ovis `ovis/model/modeling_ovis.py` (`smart_resize`), which has it from Qwen2-VL.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from siglane.errors import ConfigError
from siglane.tiling.bounds import Bounds, bounds_within, fitted, multiples
from siglane.tiling.rule import Budgeted, ImageBudget, ImageContext, LayoutRule, PatchGeometry, whole_tile
from siglane.types import Grid, ImageLayout, ImagePlaceholder, Indicator, Resample, Size, Tile, VideoSize

LONGEST_ASPECT = 200
IMAGE_START, IMAGE_END, VIDEO_START, VIDEO_END = map(Indicator, range(4))


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeResolution(LayoutRule):
    """factor: both sides are multiples of it, patch_size times the patches along a merged block; min_pixels,
    max_pixels: bounds of the resized picture or frame, no max_pixels: as large as it comes."""

    factor: int
    min_pixels: int
    max_pixels: int | None
    resample: Resample

    def __post_init__(self) -> None:
        if self.max_pixels is not None and not max(self.factor**2, self.min_pixels) <= self.max_pixels:
            raise ConfigError(
                f"max_pixels {self.max_pixels} is less than min_pixels {self.min_pixels} or than one block of "
                f"{self.factor}x{self.factor}"
            )

    def image(self, size: Size, geometry: PatchGeometry, context: ImageContext) -> ImageLayout:
        """The picture between the two indicators of an image."""
        whole = self._whole(size, geometry)
        rows = geometry.projected(whole.grid)
        pieces = (IMAGE_START, ImagePlaceholder(rows.area), IMAGE_END)
        return ImageLayout(size, (whole,), pieces, Grid(1, 1), projected=(rows,))

    def video(self, video: VideoSize, geometry: PatchGeometry) -> ImageLayout:
        """All frames in one run between the two indicators of a video, each at the first one's size."""
        whole = self._whole(video.size, geometry)
        rows, tiles = geometry.projected(whole.grid), whole.in_frames(video.frames)
        pieces = (VIDEO_START, ImagePlaceholder(video.frames * rows.area), VIDEO_END)
        projected = (rows,) * video.frames
        return ImageLayout(video.size, tiles, pieces, Grid(1, 1), frames=video.frames, projected=projected)

    def within(self, budget: ImageBudget) -> Budgeted:
        """`bounds_within`."""
        least, most, detail = bounds_within(budget, self.factor, self.min_pixels, self.max_pixels)
        return Budgeted(replace(self, min_pixels=least, max_pixels=most), detail)

    def _whole(self, size: Size, geometry: PatchGeometry) -> Tile:
        target = smart_resize(size, factor=self.factor, min_pixels=self.min_pixels, max_pixels=self.max_pixels)
        return whole_tile(target, self.resample, geometry)


def smart_resize(size: Size, *, factor: int, min_pixels: int, max_pixels: int | None) -> Size:
    """The size a picture of `size` is resized to: `fitted`, of sides that are long enough for it.

    Where the reference would leave a side of 0 pixels (a strip that is far too long) or pass max_pixels while it
    enlarges, the sides are rounded down, each at least `factor`, and max_pixels is kept.
    """
    (width, height), bounds = _at_least(size, factor), Bounds(factor, min_pixels, max_pixels)
    found = fitted(Size(width, height), bounds)
    if max_pixels is None or found.width * found.height <= max_pixels:
        return found
    scale = math.sqrt(min(max(width * height, min_pixels), max_pixels) / (width * height))
    down = multiples(Size(width, height), factor, lambda side: math.floor(side * scale / factor))
    blocks, rows = max_pixels // factor**2, down.height // factor
    columns = min(down.width // factor, max(1, blocks // rows))
    return Size(columns * factor, min(rows, blocks // columns) * factor)


def _at_least(size: Size, factor: int) -> Size:
    """A side shorter than `factor` is enlarged to it together with the other; any other strip is cut to 200 : 1."""
    width, height = size
    if min(size) < factor:
        if height < width:
            return Size(round(factor / height * width), factor)
        return Size(factor, round(factor / width * height))
    return Size(min(width, LONGEST_ASPECT * height), min(height, LONGEST_ASPECT * width))
