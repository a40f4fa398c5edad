"""Learned positions, brought to each image's grid by the rule of its family."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from siglane.config.vision import VisionConfig
from siglane.nn.attention import runs_of
from siglane.nn.linear import ShardedModule, copy_checked
from siglane.types import Grid

KEPT_PATCHES = 1 << 16  # rows of all kept tables; at width 1152 in float32: 288 MiB


class PositionEmbedding(ShardedModule):
    """A table `[h * w, hidden_size]` over `config.position_grid`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.position_grid.area, config.hidden_size))
        self._tables: OrderedDict[Grid, torch.Tensor] = OrderedDict()
        self._made_from: tuple[torch.Tensor, int] | None = None

    def forward(self, x: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """x: `[N, hidden_size]`, patches of `grids` in raster order; every image gets its own resized table."""
        outputs = []
        runs = runs_of(grids)
        for rows, (grid, count) in zip(x.split([grid.area * count for grid, count in runs]), runs, strict=True):
            images = rows.unflatten(0, (count, grid.area)) + self.table(grid)
            outputs.append(images.flatten(0, 1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def table(self, grid: Grid) -> torch.Tensor:
        """The positions of `grid`, `[h * w, hidden_size]`. ValueError when the family never resizes its table.

        Those of a frozen parameter are kept, at most `KEPT_PATCHES` rows: real traffic has few shapes.
        """
        learned, rule = self.config.position_grid, self.config.position_resize
        # torch's fused optimisers and inference mode change values without a trace
        frozen = not self.weight.requires_grad and not self.weight.is_inference()
        if not frozen or self._changed():
            self._tables.clear()
        if grid == learned and rule != "bucketised":
            return self.weight
        if rule == "never":
            raise ValueError(f"this tower has positions for a grid of {learned.h}x{learned.w}, not {grid.h}x{grid.w}")
        if not frozen:
            return self._resized(grid)
        if grid not in self._tables:
            self._tables[grid] = self._resized(grid)
        self._tables.move_to_end(grid)
        table = self._tables[grid]
        while sum(kept.area for kept in self._tables) > KEPT_PATCHES:
            self._tables.popitem(last=False)
        return table

    def _changed(self) -> bool:
        """Whether the parameter was loaded since the last call (its version tells) or moved (its address). The old
        values are kept until then, so that nothing else can have their address."""
        if self._made_from is not None:
            values, version = self._made_from
            if values.data_ptr() == self.weight.data_ptr() and version == self.weight._version:
                return False
        self._made_from = (self.weight.detach(), self.weight._version)
        return True

    def _resized(self, grid: Grid) -> torch.Tensor:
        if self.config.position_resize == "bucketised":
            return self.weight[bucketised(grid, self.config.position_grid).to(self.weight.device)]
        bilinear = self.config.position_resize == "bilinear_antialias"
        picture = self.weight.float().unflatten(0, self.config.position_grid).permute(2, 0, 1)[None]
        if bilinear and grid.w == 1:
            # torch's antialiasing on CPUs gives every row of one column the first row's values (2.10 to 2.15); of one
            # row it is right, and bilinear weights are a product of both axes', so that the transpose is the same
            picture, grid = picture.transpose(2, 3), Grid(1, grid.h)
        resized = F.interpolate(
            picture, size=grid, mode="bilinear" if bilinear else "bicubic", align_corners=False, antialias=bilinear
        )
        return resized[0].permute(1, 2, 0).flatten(0, 1).to(self.weight.dtype)

    def load_part(self, name: str, part: str, tensor: torch.Tensor) -> None:
        copy_checked(self.weight, tensor.flatten(0, -2))


def bucketised(grid: Grid, learned: Grid) -> torch.Tensor:
    """Which learned position each patch of `grid` takes, `[h * w]`: the table is stretched over the picture (Idefics3).

    Fractions of a side are compared in float32, the rounding of which decides: a grid of 19 x 19 does not get its own
    19 x 19 positions one by one.
    """
    rows, columns = (_buckets(*sides) for sides in zip(grid, learned, strict=True))
    return (rows[:, None] * learned.w + columns).flatten()


def _buckets(length: int, learned: int) -> torch.Tensor:
    """transformers `Idefics3VisionEmbeddings`."""
    step = 1.0 / torch.tensor(length)
    fractions = (torch.arange(length, dtype=torch.float32) * step).clamp(max=1 - 1e-6)
    return torch.bucketize(fractions, torch.arange(1 / learned, 1.0, 1 / learned, dtype=torch.float32), right=True)
