"""`segments.py`'s function as torch meets it."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Sequence

import torch

from siglane.nn.cpu.jit.code import Compiled
from siglane.nn.cpu.jit.processor import this_processor
from siglane.nn.cpu.jit.segments import CALL, QUERIES, room, segments_module
from siglane.nn.cpu.jit.types import ADDRESS, COUNT

ALONE = 1 << 18  # products of a query and a key from which several threads are faster than one


class SegmentAttention:
    """For heads of `head_dim` values, a multiple of 8."""

    def __init__(self, head_dim: int) -> None:
        self._owner, self._room = Compiled(segments_module(head_dim, this_processor())), room(head_dim)["end"]
        self._attend = self._owner.function("attend", ADDRESS, COUNT)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], scale: float
    ) -> torch.Tensor:
        """q, k and v bfloat16 `[N, heads, head_dim]` -> the same, of segments of `lengths`, which add up to N:
        softmax(q k^T * scale) v."""
        q, k, v = (self._together(x) for x in (q, k, v))
        y, heads = torch.empty(q.shape, dtype=torch.bfloat16), q.shape[1]
        starts = torch.tensor([0, *itertools.accumulate(lengths)])
        parts = -(-max(lengths, default=0) // QUERIES)
        items = len(lengths) * heads * parts
        alone = heads * sum(length * length for length in lengths) < ALONE
        threads = 1 if alone else min(torch.get_num_threads(), items)
        held = torch.empty(threads, self._room, dtype=torch.uint8)
        call = CALL.native(
            *(x.data_ptr() for x in (q, k, v, y, starts, held)), q.stride(0), k.stride(0), v.stride(0),
            heads, items, parts, 0, 0, scale * math.log2(math.e),
        )  # fmt: skip
        self._attend(ctypes.addressof(call), threads)
        return y

    @staticmethod
    def _together(x: torch.Tensor) -> torch.Tensor:
        """Its heads without gaps between them."""
        return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
