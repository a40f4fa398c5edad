"""Plain SigLIP of fixed resolution: every picture squashed to one tile (formats.md 1.5)."""

from __future__ import annotations

from dataclasses import dataclass

from siglane.tiling.rule import Budgeted, ImageBudget, ImageContext, PatchGeometry, no_video
from siglane.types import Box, Grid, ImageLayout, ImagePlaceholder, Resample, Resize, Size, Tile, VideoSize


@dataclass(frozen=True, slots=True, kw_only=True)
class Squash:
    """tile: pixels of the one tile, aspect ignored."""

    tile: Size
    resample: Resample

    def image(self, size: Size, geometry: PatchGeometry, context: ImageContext) -> ImageLayout:
        grid = geometry.grid(self.tile)
        whole = Tile((Resize(self.tile, self.resample),), Box(0, 0, self.tile.width, self.tile.height), grid)
        rows = geometry.projected(grid)
        return ImageLayout(size, (whole,), (ImagePlaceholder(rows.area),), Grid(1, 1), projected=(rows,))

    def video(self, video: VideoSize, geometry: PatchGeometry) -> ImageLayout:
        raise no_video()

    def within(self, budget: ImageBudget) -> Budgeted:
        budget.refuse_others()
        return Budgeted(self, "auto")
