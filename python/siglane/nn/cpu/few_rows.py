"""Few rows on their way to codes: each call counts more than what it computes."""

from __future__ import annotations

import functools
import threading
from typing import NamedTuple

import torch

FEW = 16  # rows up to which calls count more than what they compute
# from 2^23 on float32 holds whole numbers only: adding it rounds, and the low bytes of the sum are the code
WHOLE = float(2**23)
LEAST = 1e-30  # of what is divided by
LEVELS = 127  # codes on either side of zero
MIDDLE = 128  # the code of zero where codes lie on both sides of it
WIDE_LEVELS = 2**15 - 1 - MIDDLE  # on either side of zero in two bytes, each with its own MIDDLE


class Scratch(NamedTuple):
    """What few rows `[M, K]` pass through on their way to codes: to allocate it anew takes as long as to use it.

    wide: float32 `[M, K]`, and the same memory as i32; codes: u8 `[M, K]`; both: u8 `[2 M, K]`.
    """

    wide: torch.Tensor
    integers: torch.Tensor
    codes: torch.Tensor
    both: torch.Tensor

    def peaks(self, x: torch.Tensor) -> torch.Tensor:
        """`[M, 1]`"""
        return torch.abs(x, out=self.wide).amax(-1, keepdim=True).clamp_min_(LEAST)

    def whole(self, x: torch.Tensor, steps: torch.Tensor, zero: int) -> torch.Tensor:
        """`x * steps + zero`, rounded: i32 whose low bytes are the code. steps `[M, 1]`."""
        torch.mul(x, steps, out=self.wide).add_(offset(zero))
        return self.integers

    def whole_of_one(self, x: torch.Tensor, steps: float, zero: int) -> torch.Tensor:
        torch.add(offset(zero), x, alpha=steps, out=self.wide)
        return self.integers

    def bytes(self, whole: torch.Tensor) -> torch.Tensor:
        """The high bytes, then the low ones: u8 `[2 M, K]`. Writes to `whole`."""
        high, low = self.both.chunk(2)
        low.copy_(whole)
        high.copy_(whole.bitwise_right_shift_(8))
        return self.both


class _Scratches(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[int, Scratch] = {}
        self.views: dict[torch.Size, Scratch] = {}


_scratches = _Scratches()


def scratch_of(shape: torch.Size) -> Scratch:
    """This thread's, for at most FEW rows."""
    known = _scratches.views.get(shape)
    if known is None:
        rows, inputs = shape
        with torch.inference_mode(False):  # else it could not be written to outside
            if inputs not in _scratches.buffers:
                wide, both = torch.empty(FEW, inputs), torch.empty(2 * FEW, inputs, dtype=torch.uint8)
                _scratches.buffers[inputs] = Scratch(wide, wide.view(torch.int32), both[:FEW], both)
            buffers = _scratches.buffers[inputs]
            wide, both = buffers.wide[:rows], buffers.both[: 2 * rows]
            known = Scratch(wide, buffers.integers[:rows], both[:rows], both)
        _scratches.views[shape] = known
    return known


def peak_of(row: torch.Tensor) -> float:
    low, high = torch.aminmax(row)
    return max(float(high), -float(low), LEAST)


@functools.cache
def offset(zero: int) -> torch.Tensor:
    return torch.tensor(WHOLE + zero)
