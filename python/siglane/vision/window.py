"""What each block of a tower attends to, and the order of patches in which that is a run of neighbours.

Windows are squares from the upper left corner of every tile, cut off at its right and bottom (AIDC-AI/Ovis
modeling_siglip2_navit.py `get_window_index`, which has it from Qwen2.5-VL). One permutation of the packed patches
brings each window's together, another brings all back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from siglane.config.vision import WindowConfig
from siglane.nn.attention import Segments
from siglane.types import Grid


@dataclass(frozen=True, slots=True, eq=False)
class BlockOrder:
    """segments: one for each block; order: i64 `[N]`, the raster place of each patch as the blocks see them, back: its
    inverse, both None where that is raster order."""

    segments: tuple[Segments, ...]
    order: torch.Tensor | None = None
    back: torch.Tensor | None = None

    @classmethod
    def of(cls, grids: Sequence[Grid], blocks: int, windows: WindowConfig | None, device: torch.device) -> BlockOrder:
        """Tiles stay where they are, so that a block that attends to whole tiles finds them in window order too."""
        tiles = Segments.of([grid.area for grid in grids], device)
        if windows is None:
            return cls((tiles,) * blocks)
        cut = {grid: cut_in_windows(grid, windows.side) for grid in dict.fromkeys(grids)}
        orders, lengths, start = [], [], 0
        for grid in grids:
            order, sizes = cut[grid]
            orders.append(order + start)
            lengths += sizes
            start += grid.area
        whole = torch.cat(orders)
        inside = Segments.of(lengths, device)
        segments = tuple(tiles if number in windows.full_blocks else inside for number in range(blocks))
        return cls(segments, whole.to(device), whole.argsort().to(device))

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """x: `[N, ...]` in raster order -> as the blocks see it."""
        return x if self.order is None else x[self.order]

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """x: `[N, ...]` as the blocks see it -> in raster order."""
        return x if self.back is None else x[self.back]


def cut_in_windows(grid: Grid, side: int) -> tuple[torch.Tensor, list[int]]:
    """The patches of one tile window by window, raster order inside each, and how many each window has.

    Large windows come first: neighbours of equal length are one call of the attention.
    """
    across = -(-grid.w // side)
    down, right = torch.arange(grid.h) // side, torch.arange(grid.w) // side
    window = (down[:, None] * across + right).flatten()
    sizes, by_size = window.bincount().sort(descending=True, stable=True)
    return by_size.argsort()[window].argsort(stable=True), sizes.tolist()
