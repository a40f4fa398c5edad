"""Rotary positions, rotate-half convention, tables in float32."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from siglane.nn.cpu.jit.entrance import heads
from siglane.nn.norm import RMSNorm
from siglane.types import Grid, RopeScaling

if TYPE_CHECKING:
    from siglane.nn.cpu.jit.calls import HeadNorms, Heads

FEW = 1024  # rows that one compiled call turns in less time than several of torch
Rotary = tuple[torch.Tensor, torch.Tensor]  # cos and sin, each `[T, 1, head_dim]`, the first half of sin negated


def rotary_tables(
    positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> Rotary:
    """For `positions` `[T]`, computed in float32 and cast (transformers Qwen2)."""
    frequencies = rotary_frequencies(head_dim // 2, theta, scaling, positions.device)
    cos, sin = _tables(positions.float()[:, None] * frequencies)
    return cos.to(dtype), sin.to(dtype)


def _tables(angles: torch.Tensor) -> Rotary:
    """angles `[T, head_dim / 2]`, one for each pair."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1)[:, None], torch.cat((-sin, sin), dim=-1)[:, None]


@functools.cache
def rotary_frequencies(
    count: int, theta: float, scaling: RopeScaling | None = None, device: torch.device | None = None
) -> torch.Tensor:
    """Radians per position of `count` = head_dim / 2 pairs, float32: what checkpoints of older versions store as
    `inv_freq`."""
    exponents = torch.arange(0, 2 * count, 2, dtype=torch.float32, device=device) / (2 * count)
    frequencies = 1.0 / theta**exponents
    return frequencies if scaling is None else _stretched(frequencies, scaling)


def _stretched(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3's: slow turns become slower by `factor`, fast ones stay, those between are mixed (transformers
    `_compute_llama3_parameters`)."""
    turns = scaling.original_length * frequencies / (2 * math.pi)  # within the length it was pretrained on
    share = ((turns - scaling.low_turns) / (scaling.high_turns - scaling.low_turns)).clamp(0, 1)
    return (1 - share) * frequencies / scaling.factor + share * frequencies


def rotary_tables_2d(grids: Sequence[Grid], head_dim: int, theta: float, device: torch.device) -> Rotary:
    """For patches of `grids` in raster order, float32.

    The first half of the angles turns with the row, the second with the column, each over head_dim / 4 frequencies;
    the vector is then repeated, so that pairs are (i, i + head_dim / 2) (AIDC-AI/Ovis modeling_siglip2_navit.py).
    """
    quarter = head_dim // 4
    frequencies = 1.0 / theta ** (torch.arange(quarter, dtype=torch.float32) / quarter)
    tables: dict[Grid, torch.Tensor] = {}
    for grid in dict.fromkeys(grids):
        down = torch.arange(grid.h, dtype=torch.float32)[:, None, None] * frequencies
        across = torch.arange(grid.w, dtype=torch.float32)[None, :, None] * frequencies
        halves = (down.expand(-1, grid.w, -1), across.expand(grid.h, -1, -1))
        tables[grid] = torch.cat(halves, dim=-1).flatten(0, 1)
    return _tables(torch.cat([tables[grid] for grid in grids]).to(device))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x: `[T, heads, head_dim]`; pairs are (i, i + head_dim / 2), cos and sin as in `Rotary`."""
    if (compiled := _compiled(x)) is not None:
        return compiled.turn(x, cos, sin)
    first, second = x.chunk(2, -1)
    other = torch.cat((second, first), -1)
    if x.dtype == torch.float32:
        return torch.addcmul(x * cos, other, sin)
    return x * cos + other * sin  # half precision rounds both products, as the models' own code does


def _compiled(x: torch.Tensor) -> Heads | None:
    """What turns heads in one call."""
    few = x.shape[0] <= FEW and x.dtype == torch.float32 and _plain(x)
    return heads(x.shape[-1]) if few else None


def _plain(x: torch.Tensor) -> bool:
    """Whether nobody follows what is done to x: no gradient, no compiler."""
    followed = torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)
    return x.device.type == "cpu" and not followed


class Rotation(nn.Module):
    """`rotate`, where another kernel may stand for it."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return rotate(x, cos, sin)


class NormedRotation(nn.Module):
    """A norm of each head, then `rotate`: of the first `heads` by `q_norm`, of all others by `k_norm`."""

    def __init__(self, head_dim: int, heads: int) -> None:
        super().__init__()
        self.head_dim, self.heads = head_dim, heads

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, q_norm: RMSNorm, k_norm: RMSNorm
    ) -> torch.Tensor:
        if (compiled := _compiled(x)) is not None and (norms := self.norms(q_norm, k_norm)) is not None:
            return compiled.turn(x, cos, sin, norms)
        q, k = x.split([self.heads, x.shape[1] - self.heads], 1)
        return rotate(torch.cat((q_norm(q), k_norm(k)), 1), cos, sin)

    def norms(self, q_norm: RMSNorm, k_norm: RMSNorm) -> HeadNorms | None:
        """As compiled loops read them; None for gains that are not float32, or two different eps."""
        from siglane.nn.cpu.jit.calls import HeadNorms

        gains = q_norm.weight, k_norm.weight
        if q_norm.eps != k_norm.eps or any(gain.dtype != torch.float32 for gain in gains):
            return None
        return HeadNorms(*gains, self.heads, q_norm.eps)
