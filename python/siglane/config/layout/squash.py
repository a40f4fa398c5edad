"""Plain SigLIP of fixed resolution: every picture squashed to one tile (formats.md 1.5)."""

from __future__ import annotations

from dataclasses import dataclass

from siglane.config.layout.rule import Budgeted, Cells, ImageBudget, Place, no_video
from siglane.types import Box, Clip, Features, Grid, ImageLayout, Resample, Resize, Size, Tile


@dataclass(frozen=True, slots=True, kw_only=True)
class Squash:
    """tile: pixels of the one tile, aspect ignored."""

    tile: Size
    resample: Resample

    def image(self, size: Size, cells: Cells, place: Place) -> ImageLayout:
        grid = cells.grid(self.tile)
        whole = Tile((Resize(self.tile, self.resample),), Box(0, 0, self.tile.width, self.tile.height), grid)
        return ImageLayout(size, (whole,), (Features(cells.projected(grid).area),), Grid(1, 1))

    def clip(self, clip: Clip, cells: Cells) -> ImageLayout:
        raise no_video()

    def within(self, budget: ImageBudget) -> Budgeted:
        budget.refuse_others()
        return Budgeted(self, "auto")
