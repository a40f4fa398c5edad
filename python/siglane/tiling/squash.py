"""Plain SigLIP of fixed resolution: every picture squashed to one tile (formats.md 1.5)."""

from __future__ import annotations

from dataclasses import dataclass

from siglane.tiling.rule import Budgeted, ImageBudget, ImageContext, LayoutRule, PatchGeometry, whole_tile
from siglane.types import Grid, ImageLayout, ImagePlaceholder, Resample, Size


@dataclass(frozen=True, slots=True, kw_only=True)
class Squash(LayoutRule):
    """tile: pixels of the one tile, aspect ignored."""

    tile: Size
    resample: Resample

    def image(self, size: Size, geometry: PatchGeometry, context: ImageContext) -> ImageLayout:
        whole = whole_tile(self.tile, self.resample, geometry)
        rows = geometry.projected(whole.grid)
        return ImageLayout(size, (whole,), (ImagePlaceholder(rows.area),), Grid(1, 1), projected=(rows,))

    def within(self, budget: ImageBudget) -> Budgeted:
        budget.refuse_others()
        return Budgeted(self, "auto")
