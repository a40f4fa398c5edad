"""Learned positions, brought to each image's grid by the rule of its family."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import nn

from siglane.config.vision import VisionConfig
from siglane.nn.linear import ShardedModule, copy_checked
from siglane.types import Grid

KEPT_TABLES = 64  # of 30x40 patches and width 1152 in float32: 5 MiB each


class PositionEmbedding(ShardedModule):
    """A table `[h * w, hidden_size]` over `config.position_grid`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.position_grid.area, config.hidden_size))
        self._tables: OrderedDict[Grid, torch.Tensor] = OrderedDict()
        self._state = (0, 0)

    def forward(self, x: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """x: `[N, hidden_size]`, patches of `grids` in raster order; every image gets its own resized table."""
        outputs = []
        start = 0
        for grid, group in groupby(grids):
            count = sum(1 for _ in group)
            stop = start + count * grid.area
            images = x[start:stop].unflatten(0, (count, grid.area)) + self.table(grid)
            outputs.append(images.flatten(0, 1))
            start = stop
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def table(self, grid: Grid) -> torch.Tensor:
        """The positions of `grid`, `[h * w, hidden_size]`. ValueError when the family never resizes its table.

        Kept per grid while no gradient is wanted: real traffic has few shapes.
        """
        learned, rule = self.config.position_grid, self.config.position_resize
        if grid == learned:
            return self.weight
        if rule == "never":
            raise ValueError(f"this tower has positions for a grid of {learned.h}x{learned.w}, not {grid.h}x{grid.w}")
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return self._resized(grid)
        # a table that was loaded, moved or trained since has another address or version
        state = (self.weight.data_ptr(), 0 if self.weight.is_inference() else self.weight._version)
        if state != self._state:
            self._state = state
            self._tables.clear()
        if grid in self._tables:
            self._tables.move_to_end(grid)
            return self._tables[grid]
        table = self._tables[grid] = self._resized(grid)
        while len(self._tables) > KEPT_TABLES:
            self._tables.popitem(last=False)
        return table

    def _resized(self, grid: Grid) -> torch.Tensor:
        bilinear = self.config.position_resize == "bilinear_antialias"
        picture = self.weight.float().unflatten(0, self.config.position_grid).permute(2, 0, 1)[None]
        resized = F.interpolate(
            picture, size=grid, mode="bilinear" if bilinear else "bicubic", align_corners=False, antialias=bilinear
        )
        return resized[0].permute(1, 2, 0).flatten(0, 1).to(self.weight.dtype)

    def load_part(self, name: str, part: str, tensor: torch.Tensor) -> None:
        copy_checked(self.weight, tensor.flatten(0, -2), self.weight.shape)
