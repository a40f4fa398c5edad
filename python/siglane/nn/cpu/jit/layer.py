"""A layer whose few rows go through one compiled function."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from siglane.nn.cpu.int8_packing import INPUTS, OUTPUTS
from siglane.nn.cpu.jit.code import ADDRESS, COUNT, Compiled
from siglane.nn.cpu.jit.product import LAYER
from siglane.nn.cpu.jit.rows import KINDS, MOST, rows_module

THREAD_BYTES = 1 << 17  # of weights from which several threads are faster than one
Rows = Literal["centred", "wide"]  # a byte a value, or two
Function = Callable[..., None]


class FewRows:
    """Rows float32 `[M, K]`, at most `most` -> `[M, N]`: codes, product, scales and what comes after in one call.

    packed: codes of a weight `[N, K]` in the order that `int8_packing` knows; scale `[N]`, bias `[N]` or None; eps: of
    an RMSNorm without gain that stands before the layer.
    """

    most = MOST

    def __init__(
        self, rows: Rows, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, inputs: int,
        eps: float | None,
    ) -> None:  # fmt: skip
        functions = _functions()
        self._multiply, self._gate = functions.by_name[rows], functions.by_name["gated"]
        self._outputs = outputs = len(scale)
        self.gates = rows == "centred" and outputs % (2 * OUTPUTS) == 0
        blocks, self._stride = -(-outputs // OUTPUTS), -(-inputs // INPUTS) * INPUTS
        first, size = torch.ops.mkldnn.data_ptr(packed), blocks * OUTPUTS * self._stride
        self._threaded = size >= THREAD_BYTES
        bias = torch.zeros(outputs) if bias is None else bias
        self._held = (functions, packed, scale, bias)  # whose addresses are used
        self._facts = LAYER.native(
            first, first + size, scale.data_ptr(), bias.data_ptr(),
            outputs, inputs, self._stride, blocks, eps is not None, eps or 0.0,
        )  # fmt: skip
        self._address = ctypes.addressof(self._facts)

    def takes(self, *rows: torch.Tensor) -> bool:
        return all(x.ndim == 2 and x.dtype == torch.float32 and x.shape[0] <= MOST for x in rows)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """residual: `[M, N]`, is added."""
        y = torch.empty(x.shape[0], self._outputs)
        if residual is None:
            self._run(self._multiply, x, y, None)
        else:
            residual = residual.contiguous()
            self._run(self._multiply, x, y, residual.data_ptr())
        return y

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """SwiGLU of the results: `[M, N / 2]`. Only where it `gates`."""
        y = torch.empty(x.shape[0], self._outputs // 2)
        self._run(self._gate, x, y, None)
        return y

    def _run(self, function: Function, x: torch.Tensor, y: torch.Tensor, residual: int | None) -> None:
        x, rows = x.contiguous(), x.shape[0]
        threads = torch.get_num_threads() if self._threaded else 1
        function(
            self._address, x.data_ptr(), y.data_ptr(), residual, _room.address(2 * rows * self._stride), rows, threads
        )


class _Room(threading.local):
    """Bytes for codes, of each thread its own: to allocate them anew takes as long as to use them."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def address(self, size: int) -> int:
        if len(self._bytes) < size:
            self._bytes = torch.empty(2 * size, dtype=torch.uint8)
        return self._bytes.data_ptr()


_room = _Room()


class _Functions(NamedTuple):
    """owner: what keeps their machine code."""

    by_name: dict[str, Function]
    owner: Compiled


@functools.cache
def _functions() -> _Functions:
    owner = Compiled(rows_module())
    arguments = (*[ADDRESS] * 5, COUNT, COUNT)
    return _Functions({kind.name: owner.function(kind.name, *arguments) for kind in KINDS}, owner)
