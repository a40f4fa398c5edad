"""`between.py`'s functions as torch meets them."""

from __future__ import annotations

import ctypes

import torch

from siglane.nn.cpu.between import Between
from siglane.nn.cpu.codes import Codes
from siglane.nn.cpu.jit.between import CALL, SIGMOIDS, between_module
from siglane.nn.cpu.jit.code import Compiled
from siglane.nn.cpu.jit.processor import this_processor
from siglane.nn.cpu.jit.types import ADDRESS, COUNT
from siglane.types import Activation

ALONE = 1 << 14  # values below which one thread is faster than several


class CompiledBetween(Between):
    """One pass over each row, by all threads."""

    def __init__(self) -> None:
        owner = self._owner = Compiled(between_module(this_processor()))
        names = ("normed", "coded", "coded_half", "finished", "finished_half", "added", *SIGMOIDS)
        self._functions = {name: owner.function(name, ADDRESS, COUNT) for name in names}

    def normed(self, x: torch.Tensor, gain: torch.Tensor, eps: float) -> Codes:
        made = _room(x.shape)
        self._run("normed", x, table=gain, made=made, eps=eps)
        return made

    def coded(self, x: torch.Tensor) -> Codes:
        made = _room(x.shape)
        self._run("coded" if x.dtype == torch.float32 else "coded_half", x, made=made)
        return made

    def finished(self, sums: torch.Tensor, rows: Codes, corrections: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        name = "finished" if y.dtype == torch.float32 else "finished_half"
        self._run(name, sums, table=corrections, marks=rows.marks, y=y)
        return y

    def added(
        self, sums: torch.Tensor, rows: Codes, corrections: torch.Tensor, residual: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        self._run("added", sums, table=corrections, marks=rows.marks, y=y, residual=residual)
        return y

    def activated(self, sums: torch.Tensor, rows: Codes, corrections: torch.Tensor, activation: Activation) -> Codes:
        if activation not in SIGMOIDS:
            return super().activated(sums, rows, corrections, activation)
        made = _room(sums.shape)
        self._run(activation, sums, table=corrections, marks=rows.marks, made=made)
        return made

    def _run(
        self,
        name: str,
        x: torch.Tensor,
        table: torch.Tensor | None = None,
        marks: torch.Tensor | None = None,
        made: Codes | None = None,
        y: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        codes, own = (None, None) if made is None else made
        given = (x, table, marks, codes, own, y, residual)
        assert all(tensor is None or tensor.is_contiguous() for tensor in given)
        addresses = (None if tensor is None else tensor.data_ptr() for tensor in given)
        call = CALL.native(*addresses, *x.shape, eps, 0)
        threads = 1 if x.numel() < ALONE else torch.get_num_threads()
        self._functions[name](ctypes.addressof(call), threads)


def _room(shape: torch.Size) -> Codes:
    return Codes(torch.empty(shape, dtype=torch.uint8), torch.empty(shape[0], 2))
