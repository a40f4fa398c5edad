"""Merging neighbouring patches before the projector's linear layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from siglane.config.projector import ProjectorConfig
from siglane.nn.attention import runs_of
from siglane.tiling.merge import projected_grid
from siglane.types import Grid


def merged_rows(features: torch.Tensor, grids: Sequence[Grid], config: ProjectorConfig) -> torch.Tensor:
    """Features `[N, c]` of `grids` -> `[rows, merged]`, image after image; neighbours of one grid are one batch."""
    if sum(grid.area for grid in grids) != features.shape[0]:
        raise ValueError(f"grids hold {sum(grid.area for grid in grids)} patches, got {features.shape[0]} rows")
    merged = []
    runs = runs_of(grids)
    for rows, (grid, count) in zip(features.split([grid.area * count for grid, count in runs]), runs, strict=True):
        merged.append(merge_patches(rows.unflatten(0, (count, *grid)), config).flatten(0, 1))
    return merged[0] if len(merged) == 1 else torch.cat(merged)


def merge_patches(maps: torch.Tensor, config: ProjectorConfig) -> torch.Tensor:
    """Feature maps `[B, h, w, c]` of one grid -> rows `[B, rows, merged]`, `rows` as `projected_grid` counts them."""
    return maps.flatten(1, 2) if config.merge == "none" else concatenate_blocks(maps, config)


def concatenate_blocks(maps: torch.Tensor, config: ProjectorConfig) -> torch.Tensor:
    """factor x factor neighbours side by side on the channel axis, in the order (row, column, channel).

    Grids that do not divide are padded with zeros at the bottom and right. This is not torch's pixel_unshuffle, whose
    order is (channel, row, column).
    """
    factor = config.factor
    grid = projected_grid(Grid(maps.shape[1], maps.shape[2]), config)
    below, right = grid.h * factor - maps.shape[1], grid.w * factor - maps.shape[2]
    if below or right:
        maps = F.pad(maps, (0, 0, 0, right, 0, below))
    blocks = maps.unflatten(2, (grid.w, factor)).unflatten(1, (grid.h, factor))  # [B, H, dr, W, dc, c]
    order = (0, 3, 1, 2, 4, 5) if config.column_major else (0, 1, 3, 2, 4, 5)
    return blocks.permute(order).flatten(3).flatten(1, 2)
