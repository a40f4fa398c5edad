"""How many rows a projector makes of a grid of patches."""

from __future__ import annotations

from typing import Literal, Protocol

from siglane.types import Grid

Merge = Literal["none", "blocks", "pixel_shuffle"]


class PatchMerge(Protocol):
    """The facts of a projector that decide it (`ProjectorConfig`)."""

    @property
    def merge(self) -> Merge: ...
    @property
    def factor(self) -> int: ...


def projected_grid(grid: Grid, merge: PatchMerge) -> Grid:
    """Rows and columns the projector makes of one tile's patch grid."""
    match merge.merge:
        case "none":
            return grid
        case "pixel_shuffle":
            if grid.h % merge.factor or grid.w % merge.factor:
                raise ValueError(f"pixel shuffle by {merge.factor} does not divide a grid of {grid.h}x{grid.w}")
            return Grid(grid.h // merge.factor, grid.w // merge.factor)
        case "blocks":
            return Grid(-(-grid.h // merge.factor), -(-grid.w // merge.factor))
