"""A layer whose rows go through one compiled function."""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from siglane.nn.cpu.int8_packing import INPUTS, OUTPUTS
from siglane.nn.cpu.jit.code import Compiled
from siglane.nn.cpu.jit.processor import Processor, this_processor
from siglane.nn.cpu.jit.product import LAYER
from siglane.nn.cpu.jit.program import Call, Function
from siglane.nn.cpu.jit.rows import CODED, FOURS, KINDS, MOST, Kind, rows_module
from siglane.nn.cpu.jit.tiles import TILE_ROWS
from siglane.nn.cpu.jit.types import ADDRESS, COUNT
from siglane.nn.cpu.memory import span

THREAD_VALUES = 1 << 17  # of weights from which several threads are faster than one
MOST_OF_FOUR = 32  # rows: of more a product of unpacked weights takes less time
Rows = Literal["centred", "wide"]  # a byte a value, or two


class Facts(NamedTuple):
    """`LAYER` of product.py: addresses, sizes; scale, bias `[outputs]`; stride: bytes of a row on its way; most:
    rows of a call."""

    packed: int
    tail: int
    scale: torch.Tensor | None
    bias: torch.Tensor | None
    outputs: int
    inputs: int
    stride: int
    eps: float | None
    group: int = 0
    most: int = MOST


class NativeLayer:
    """A layer as compiled loops read it."""

    def __init__(self, facts: Facts, held: tuple[torch.Tensor, ...]) -> None:
        """held: whose addresses `facts` has."""
        scale = None if facts.scale is None else _whole_blocks(facts.scale)
        bias = _whole_blocks(torch.zeros(facts.outputs) if facts.bias is None else facts.bias)
        self._held = (scale, bias, *held)
        self._native = LAYER.native(
            facts.packed, facts.tail, None if scale is None else scale.data_ptr(), bias.data_ptr(),
            facts.outputs, facts.inputs, facts.stride, _whole(facts.outputs, OUTPUTS) // OUTPUTS,
            facts.eps is not None, facts.eps or 0.0, facts.group,
        )  # fmt: skip
        self.address, self.facts = ctypes.addressof(self._native), facts

    @classmethod
    def eight(
        cls, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, inputs: int, eps: float | None = None
    ) -> NativeLayer:
        """packed: codes of a weight `[N, K]` in the order that `int8_packing` knows; scale `[N]`, bias `[N]` or None;
        eps: of an RMSNorm without gain that stands before the layer."""
        outputs, stride = len(scale), _whole(inputs, INPUTS)
        first, size = span(packed)[0], _whole(outputs, OUTPUTS) * stride
        return cls(Facts(first, first + size, scale, bias, outputs, inputs, stride, eps), (packed,))


class CompiledLayer:
    """Rows float32 `[M, K]`, at most `most` -> `[M, N]`: what a product takes, the product, and what comes after it, in
    one call. `eight` and `four` make it of weights of so many bits.

    most: rows of a call; outputs: N; gates: whether SwiGLU can be what comes after.
    """

    def __init__(self, functions: _Functions, multiply: str, gate: str | None, native: NativeLayer) -> None:
        """multiply, gate: names of functions."""
        by_name, facts = functions.by_name, native.facts
        self.most = facts.most
        self._multiply, self._gate = by_name[multiply], None if gate is None else by_name[gate]
        self.gates = gate is not None and facts.outputs % (2 * OUTPUTS) == 0
        self.outputs, self._stride = facts.outputs, facts.stride
        self._threaded = facts.outputs * facts.inputs >= THREAD_VALUES
        self._held, self._address = (functions, native), native.address

    @classmethod
    def eight(
        cls, rows: Rows, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, inputs: int,
        eps: float | None,
    ) -> CompiledLayer:  # fmt: skip
        """As `NativeLayer.eight`."""
        native = NativeLayer.eight(packed, scale, bias, inputs, eps)
        return cls(_functions(KINDS, this_processor()), rows, "gated" if rows == "centred" else None, native)

    @classmethod
    def coded(cls, packed: torch.Tensor, scale: torch.Tensor, inputs: int) -> CompiledLayer:
        """As `eight`, of rows that are codes u8 already: `(codes * scale) W^T`."""
        native = NativeLayer.eight(packed, scale, None, inputs)
        return cls(_functions(CODED, this_processor()), "coded", None, native)

    @classmethod
    def four(
        cls, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, outputs: int, inputs: int,
        eps: float | None,
    ) -> CompiledLayer:  # fmt: skip
        """codes u8 `[N, K / 2]` as torch packs them for AVX-512; scales bfloat16 `[K / group, N, 2]`, N and K filled
        up."""
        filled = 2 * codes.shape[1]
        facts = Facts(
            codes.data_ptr(),
            scales.data_ptr(),
            None,
            bias,
            outputs,
            inputs,
            4 * filled,
            eps,
            filled // len(scales),
            MOST_OF_FOUR,
        )
        return cls(_functions(FOURS, this_processor()), "four", "four_gated", NativeLayer(facts, (codes, scales)))

    def takes(self, *rows: torch.Tensor) -> bool:
        return all(x.ndim == 2 and x.dtype == torch.float32 and x.shape[0] <= self.most for x in rows)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """residual: `[M, N]`, is added."""
        y = torch.empty(x.shape[0], self.outputs)
        if residual is None:
            self._run(self._multiply, x, y, None)
        else:
            residual = residual.contiguous()
            self._run(self._multiply, x, y, residual.data_ptr())
        return y

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """SwiGLU of the results: `[M, N / 2]`. Only where it `gates`."""
        assert self._gate is not None
        y = torch.empty(x.shape[0], self.outputs // 2)
        self._run(self._gate, x, y, None)
        return y

    def call(self, x: int | str, y: int, codes: int, residual: int | str = 0, *, gated: bool = False) -> Call:
        """The same in a `Program`, which is told `rows` and `threads`, by addresses; codes: of `room` bytes."""
        function = self._gate if gated else self._multiply
        assert function is not None
        return Call(function, (self._address, x, y, residual, codes, "rows", "threads" if self._threaded else 1))

    def room(self, rows: int) -> int:
        """Bytes for codes of so many rows."""
        return _whole(2 * rows, TILE_ROWS) * self._stride

    def _run(self, function: Function, x: torch.Tensor, y: torch.Tensor, residual: int | None) -> None:
        x, rows = x.contiguous(), x.shape[0]
        threads = torch.get_num_threads() if self._threaded else 1
        codes = _room.address(self.room(rows))
        function(self._address, x.data_ptr(), y.data_ptr(), residual, codes, rows, threads)


def _whole(count: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-count // step) * step


def _whole_blocks(values: torch.Tensor) -> torch.Tensor:
    """Float32 `[N]`, filled up with zeros."""
    return F.pad(values.float(), (0, _whole(len(values), OUTPUTS) - len(values))).contiguous()


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
def _functions(kinds: tuple[Kind, ...], processor: Processor) -> _Functions:
    owner = Compiled(rows_module(kinds, processor))
    arguments = (*[ADDRESS] * 5, COUNT, COUNT)
    return _Functions({kind.name: owner.function(kind.name, *arguments) for kind in kinds}, owner)
