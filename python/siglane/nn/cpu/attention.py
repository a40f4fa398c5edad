"""Attention on CPUs, without gradients, in less time than torch's: float32 of long segments by plain products, bfloat16
by a compiled loop."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch

from siglane.nn.cpu.jit.entrance import segments
from siglane.nn.cpu.product import linear, wants_gradient

if TYPE_CHECKING:
    from siglane.nn.cpu.jit.segments_calls import SegmentAttention

LONG = 320  # rows of a segment from which two plain products beat a CPU's fused attention
SCORES = 1 << 20  # of one head that a CPU's cache takes
LOG2_E = math.log2(math.e)
SAFE_SUMS = (1e-25, 1e30)  # of a row's exponentials: no weight that counts is lost to float32's range


def compiled_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> SegmentAttention | None:
    """What attends to them, `[N, heads, head_dim]`; None where another kernel has to."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or q.shape != k.shape:
        return None
    if torch.compiler.is_compiling() or wants_gradient(q, k, v):
        return None
    return segments(q.shape[-1])


def takes_heads_alone(length: int) -> bool:
    """Whether segments of so many rows are better off by `attention_by_head`. Under AVX2 torch's fused attention is the
    faster one at every length."""
    return length >= LONG and not _is_avx2()


@functools.cache
def _is_avx2() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def attention_by_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """q, k and v float32 `[B, L, heads, head_dim]` -> the same: softmax(q k^T * scale) v of each of B segments."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for segment in zip(q, k, v, out, strict=True):
        _one_segment(*segment, scale)
    return out


def _one_segment(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, scale: float) -> None:
    """One head after another, so that its scores stay in the cache."""
    rows = max(LONG, SCORES // len(q))
    # all views at once: a block has few other calls, and each takes its microseconds
    heads = zip(q.unbind(1), k.unbind(1), v.unbind(1), out.unbind(1), strict=True)
    for queries, keys, values, attended in heads:
        keys, values = keys.contiguous(), values.contiguous().T  # oneDNN reads either order, but no wider rows
        for some, into in zip(queries.split(rows), attended.split(rows), strict=True):
            weights, totals = _weights(some, keys, scale)
            torch.div(linear(weights, values), totals, out=into)


def _weights(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The softmax of one head before its division: weights `[rows, keys]` and their sums `[rows, 1]`.

    exp2 takes a part of the time of a CPU's softmax (`python benchmark/machine.py`). Only where the exponentials leave
    float32's range is each row's largest score taken off first, as softmax does.
    """
    weights = linear(queries * (scale * LOG2_E), keys).exp2_()
    totals = weights.sum(-1, keepdim=True)
    least, most = totals.aminmax()
    if not (SAFE_SUMS[0] < least.item() and most.item() < SAFE_SUMS[1]):
        weights = torch.softmax(linear(queries * scale, keys), -1)
        totals = torch.ones_like(totals)
    return weights, totals
