"""An 8-bit encoder block but for its attention: a thread takes some rows from a norm to q, k and v, or from attention's
results to the next block, all products and passes on the way, so that nothing of theirs leaves its core's cache.

The arithmetic is that of `between.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llvmlite import ir

from siglane.nn.cpu.int8_packing import OUTPUTS
from siglane.nn.cpu.jit.between import SIGMOIDS, as_it_is, encode, normed
from siglane.nn.cpu.jit.bfloat16 import SUMS, WORD, as_float, rounded
from siglane.nn.cpu.jit.code import EXP2, Code, Module, Struct, everywhere, exp2, in_threads
from siglane.nn.cpu.jit.processor import Processor
from siglane.nn.cpu.jit.product import LAYER, MIDDLE_BITS, NUMBERS, REGISTERS, write_eight
from siglane.nn.cpu.jit.types import BYTE, FLOAT, I32, I64, LANES, POINTER, VOID

GROUP = 48  # rows of one item at most, whole tiles
NEAR = EXP2[:6]  # enough for codes

# x: rows float32 `[rows, width]`; gain: a norm's; attended: `[rows, width]`; y: `[rows, outputs of first]`, or float32
# like x; what attention reads and writes is bfloat16 where the processor multiplies it, and float32 elsewhere; first,
# second, third: layers, whose outputs are whole registers; room: of `size` bytes for each thread; group: rows of an
# item; next, entered: items and threads so far
CALL = Struct(
    x=POINTER, gain=POINTER, attended=POINTER, y=POINTER, first=POINTER, second=POINTER, third=POINTER, room=POINTER,
    size=I64, rows=I64, group=I64, next=I64, entered=I64, eps=FLOAT,
)  # fmt: skip
Finish = Callable[[Code, ir.Value, ir.Value, ir.Value], None]  # of a register of results: into, add, at its place


def room_size(stride: int, hidden: int) -> int:
    """Bytes for a thread. stride: of the widest codes; hidden: outputs between two products, in whole blocks."""
    return GROUP * (stride + 4 * hidden + 8)


def coded_module(activation: str, processor: Processor) -> Module:
    """Functions of (call, threads). heads: codes of a norm of x, times `first`; rest: x plus codes of `attended` times
    `first`, and to that the two layers of an MLP behind a norm."""
    module = Module("coded", processor)
    multiply = write_eight(module)
    sigmoid = functools.partial(_activated, slope=SIGMOIDS[activation])
    number, keep = (WORD, _narrowed) if processor.bfloat16 else (FLOAT, _kept)  # as attention reads and writes it
    kept = _product(module, multiply, "kept", keep, number)
    added = _product(module, multiply, "added", _added, FLOAT)
    activated = _product(module, multiply, "activated", sigmoid, FLOAT, in_blocks=True)
    norm, attended, wide = _norm(module), _attended(module, number), _wide(module)
    with _groups(module, "heads") as some:
        some.codes(norm, "first", some.rows_of("x", FLOAT), some.get("gain"), some.get("eps"))
        some.product(kept, "first", some.rows_of("y", number, "outputs"))
    with _groups(module, "rest") as some:
        y, hidden = some.rows_of("y", FLOAT), some.hidden()
        some.codes(attended, "first", some.rows_of("attended", number))
        some.product(added, "first", y, some.rows_of("x", FLOAT))
        some.codes(norm, "second", y, some.get("gain"), some.get("eps"))
        some.product(activated, "second", hidden)
        some.codes(wide, "third", hidden)
        some.product(added, "third", y, y)
    return module


@dataclass(frozen=True)
class _Some:
    """Rows of an item. own: the thread's room: codes, marks, what lies between two products."""

    code: Code
    call: ir.Value
    own: ir.Value
    first: ir.Value
    rows: ir.Value

    def get(self, name: str) -> ir.Value:
        return CALL.get(self.code, self.call, name)

    def rows_of(self, name: str, kind: ir.Type, width: str = "inputs") -> ir.Value:
        """Where these rows begin in a tensor as wide as the first layer's inputs or outputs."""
        code = self.code
        return code.at(self.get(name), code.mul(self.first, LAYER.get(code, self.get("first"), width)), kind)

    def hidden(self) -> ir.Value:
        return self.code.at(self.own, I64(GROUP * 8), BYTE)

    def _codes(self, layer: str) -> ir.Value:
        """At the end of the room."""
        code = self.code
        size = code.mul(LAYER.get(code, self.get(layer), "stride"), I64(GROUP))
        return code.at(self.own, code.sub(self.get("size"), size), BYTE)

    def codes(self, function: ir.Function, layer: str, *given: ir.Value) -> None:
        """For `layer`."""
        self.code.call(function, [self.get(layer), self._codes(layer), self.own, self.rows, *given])

    def product(self, function: ir.Function, layer: str, into: ir.Value, add: ir.Value | None = None) -> None:
        arguments = [self.get(layer), self._codes(layer), self.own, self.rows, into, into if add is None else add]
        self.code.call(function, arguments)


@contextmanager
def _groups(module: Module, name: str) -> Iterator[_Some]:
    code, work = Code.begin(module, f"work_{name}", VOID, POINTER)
    (call,) = work.args
    thread = code.atomic_rmw("add", CALL.address(code, call, "entered"), I64(1), "monotonic")
    own = code.at(CALL.get(code, call, "room"), code.mul(thread, CALL.get(code, call, "size")), BYTE)
    rows, group = (CALL.get(code, call, one) for one in ("rows", "group"))
    items = code.sdiv(code.add(rows, code.sub(group, I64(1))), group)
    with code.taken(CALL.address(code, call, "next"), items) as item:
        first = code.mul(item, group)
        yield _Some(code, call, own, first, code.least(code.sub(rows, first), group))
    code.ret_void()
    code, made = Code.begin(module, name, VOID, POINTER, I64)
    in_threads(code, work, *made.args)
    code.ret_void()


def _norm(module: Module) -> ir.Function:
    """layer, codes, marks, rows, x float32, a norm's gain and eps."""
    code, made = Code.begin(module, "norm", VOID, *[POINTER] * 3, I64, *[POINTER] * 2, FLOAT)
    layer, codes, marks, rows, x, gain, eps = made.args
    width = LAYER.get(code, layer, "inputs")
    with _each(code, layer, codes, marks, rows) as (row, into, own):
        line = code.at(x, code.mul(row, width), FLOAT)
        value, factor = normed(code, lambda place: code.get(line, place, FLOAT), gain, width, eps)
        encode(code, width, value, into, own, factor)
    code.ret_void()
    return made


def _attended(module: Module, number: ir.Type) -> ir.Function:
    """layer, codes, marks, rows, x of `number`s."""
    code, made = Code.begin(module, "attended", VOID, *[POINTER] * 3, I64, POINTER)
    layer, codes, marks, rows, x = made.args
    width, get = LAYER.get(code, layer, "inputs"), as_float if number is WORD else as_it_is
    with _each(code, layer, codes, marks, rows) as (row, into, own):
        line = code.at(x, code.mul(row, width), number)
        encode(code, width, lambda place: get(code, line, place), into, own)
    code.ret_void()
    return made


def _wide(module: Module) -> ir.Function:
    """layer, codes, marks, rows, x float32 in whole blocks, as a product in the room leaves it."""
    code, made = Code.begin(module, "wide", VOID, *[POINTER] * 3, I64, POINTER)
    layer, codes, marks, rows, x = made.args
    width, stride = LAYER.get(code, layer, "inputs"), LAYER.get(code, layer, "stride")
    with _each(code, layer, codes, marks, rows) as (row, into, own):
        line = code.at(x, code.mul(row, stride), FLOAT)
        encode(code, width, lambda place: code.get(line, place, FLOAT), into, own)
    code.ret_void()
    return made


@contextmanager
def _each(
    code: Code, layer: ir.Value, codes: ir.Value, marks: ir.Value, rows: ir.Value
) -> Iterator[tuple[ir.Value, ir.Value, ir.Value]]:
    """Each row: its number, where its codes and where its marks are to go."""
    stride = LAYER.get(code, layer, "stride")
    with code.count(I64(0), rows) as row:
        yield row, code.at(codes, code.mul(row, stride), BYTE), code.at(marks, code.mul(row, I64(2)), FLOAT)


def _product(
    module: Module, multiply: ir.Function, name: str, finish: Finish, kind: ir.Type, *, in_blocks: bool = False
) -> ir.Function:
    """layer, codes, marks, rows, into, add: `finish` of the results, block by block. in_blocks: rows of `into` are as
    wide as whole blocks, not as the layer's outputs."""
    code, made = Code.begin(module, f"product_{name}", VOID, *[POINTER] * 3, I64, *[POINTER] * 2)
    layer, codes, marks, rows, into, add = made.args
    blocks, sums = LAYER.get(code, layer, "blocks"), code.room(I32, GROUP * OUTPUTS)
    width = code.mul(blocks, I64(OUTPUTS)) if in_blocks else LAYER.get(code, layer, "outputs")
    with code.count(I64(0), blocks) as block:
        code.call(multiply, [layer, block, codes, rows, sums])
        first = code.mul(block, I64(OUTPUTS))
        shares, factors, shifts = zip(*(_columns(code, layer, first, n) for n in range(REGISTERS)), strict=True)
        with code.count(I64(0), rows) as row:
            scale, shift = (code.get(marks, code.add(code.mul(row, I64(2)), I64(n)), FLOAT) for n in (0, 1))
            # the codes' zero is 128 to the product, and their own to the row
            shift = code.fadd(shift, code.fmul(scale, FLOAT(1 << MIDDLE_BITS)))
            scale, shift = code.spread(scale, LANES), code.spread(shift, LANES)
            line, begin = code.mul(row, I64(REGISTERS)), code.add(code.mul(row, width), first)
            for n in range(REGISTERS):
                place = code.add(begin, I64(n * LANES))
                with code.if_then(code.icmp_signed("<", code.add(first, I64(n * LANES)), width)):
                    total = code.sitofp(code.get(sums, code.add(line, I64(n)), NUMBERS, 4), SUMS)
                    rest = code.intrinsic("llvm.fma", SUMS, shift, shares[n], shifts[n])
                    whole = code.intrinsic("llvm.fma", SUMS, code.fmul(total, factors[n]), scale, rest)
                    finish(code, whole, code.at(into, place, kind), code.at(add, place, kind))
    code.ret_void()
    return made


def _columns(code: Code, layer: ir.Value, first: ir.Value, number: int) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Of a register of outputs, of the block that begins with `first`: what a zero point adds, scales, biases."""
    place = code.add(first, I64(number * LANES))
    scale, bias = (
        code.load(code.at(LAYER.get(code, layer, one), place, FLOAT), typ=SUMS, align=4) for one in ("scale", "bias")
    )
    negative = code.load(code.at(LAYER.get(code, layer, "tail"), place, I32), typ=NUMBERS, align=4)
    return code.fneg(code.fmul(code.sitofp(negative, SUMS), scale)), scale, bias


def _kept(code: Code, result: ir.Value, into: ir.Value, _: ir.Value) -> None:
    code.store(result, into, align=4)


def _narrowed(code: Code, result: ir.Value, into: ir.Value, _: ir.Value) -> None:
    code.store(rounded(code, result), into, align=2)


def _added(code: Code, result: ir.Value, into: ir.Value, add: ir.Value) -> None:
    code.store(code.fadd(code.load(add, typ=SUMS, align=4), result), into, align=4)


def _activated(
    code: Code, x: ir.Value, into: ir.Value, _: ir.Value, slope: Callable[[Code, ir.Value], ir.Value]
) -> None:
    """x times a sigmoid."""
    power = exp2(code, code.fmul(slope(code, x), everywhere(SUMS, -math.log2(math.e))), NEAR)
    code.store(code.fdiv(x, code.fadd(everywhere(SUMS, 1.0), power)), into, align=4)
