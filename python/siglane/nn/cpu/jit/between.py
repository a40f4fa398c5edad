"""What rows of an 8-bit encoder block pass through between two of its products: one pass over each row, which stays in
the nearest cache meanwhile.

The arithmetic is that of `row_codes` and `corrected` (`cpu/codes.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llvmlite import ir

from siglane.nn.cpu.codes import STEPS
from siglane.nn.cpu.few_rows import LEAST, WHOLE
from siglane.nn.cpu.jit.bfloat16 import WORD, as_bfloat16, as_float
from siglane.nn.cpu.jit.code import EXP2, Code, Module, Struct, everywhere, in_threads
from siglane.nn.cpu.jit.processor import Processor
from siglane.nn.cpu.jit.types import BYTE, FLOAT, I32, I64, POINTER, VOID

# x: rows `[rows, width]`; table: a norm's gain `[width]`, or a layer's corrections `[2, width]`;
# marks: scale and shift `[rows, 2]` of the codes that were multiplied; codes u8 `[rows, width]` and their own marks
# `made`; y: rows of floats; residual: what is added to them
CALL = Struct(
    x=POINTER, table=POINTER, marks=POINTER, codes=POINTER, made=POINTER, y=POINTER, residual=POINTER,
    rows=I64, width=I64, eps=FLOAT, next=I64,
)  # fmt: skip
SIGN = I32(-(1 << 31))
GELU = math.sqrt(2 / math.pi), 0.044715  # of its tanh
QUICK = 1.702
SERIES = EXP2[:6]
EVERY_ONE = 1.5 * 2**23  # adding it rounds to whole numbers, which then are the lowest bits
LOG2_E = math.log2(math.e)
Value = Callable[[ir.Value], ir.Value]  # of a row, at a place


def between_module(processor: Processor) -> Module:
    """Functions of (call, threads): normed, coded, coded_half, finished, finished_half, added, and `<activation>` for
    those that are x times a sigmoid; `_half` are those that read or write bfloat16."""
    module = Module("between", processor)
    _normed(module)
    for name, get in (("coded", as_it_is), ("coded_half", as_float)):
        with _rows(module, name) as row:
            row.encode(row.of("x", get))
    _finished(module)
    for name, slope in SIGMOIDS.items():
        _activated(module, name, slope)
    return module


class _Row:
    """One row of a call."""

    def __init__(self, code: Code, call: ir.Value, place: ir.Value) -> None:
        self.code, self.call, self.place = code, call, place
        self.width = CALL.get(code, call, "width")
        self.first = code.mul(place, self.width)

    def address(self, name: str, kind: ir.Type) -> ir.Value:
        return self.code.at(CALL.get(self.code, self.call, name), self.first, kind)

    def of(self, name: str, get: Callable[[Code, ir.Value, ir.Value], ir.Value]) -> Value:
        line = self.address(name, WORD if get is as_float else FLOAT)
        return lambda place: get(self.code, line, place)

    def table(self, number: int = 0) -> Value:
        code, start = self.code, self.code.mul(self.width, I64(number))
        line = code.at(CALL.get(code, self.call, "table"), start, FLOAT)
        return lambda place: code.get(line, place, FLOAT)

    def product(self) -> Value:
        """The layer's true results, of sums of codes in `x`."""
        code, sums, shares, bias = self.code, self.of("x", as_it_is), self.table(0), self.table(1)
        marks = CALL.get(code, self.call, "marks")
        scale, shift = (code.get(marks, code.add(code.mul(self.place, I64(2)), I64(n)), FLOAT) for n in (0, 1))

        def result(place: ir.Value) -> ir.Value:
            rest = code.intrinsic("llvm.fma", FLOAT, shift, shares(place), bias(place))
            return code.intrinsic("llvm.fma", FLOAT, sums(place), scale, rest)

        return result

    def write(self, value: Value, into: ir.Value) -> None:
        with self.code.count(I64(0), self.width) as place:
            self.code.put(value(place), into, place)

    def encode(self, value: Value, factor: ir.Value | None = None, keep: ir.Value | None = None) -> None:
        """keep: as of `encode`."""
        code = self.code
        marks = code.at(CALL.get(code, self.call, "made"), code.mul(self.place, I64(2)), FLOAT)
        encode(code, self.width, value, self.address("codes", BYTE), marks, factor, keep)


def encode(
    code: Code, width: ir.Value, value: Value, codes: ir.Value, marks: ir.Value, factor: ir.Value | None = None,
    keep: ir.Value | None = None,
) -> None:  # fmt: skip
    """A row's codes of `value`, and its scale, times `factor`, and shift. keep: where values are kept, if to compute
    them again takes long."""
    peaks = [code.variable(I32(0)) for _ in range(2)]  # above zero and below it
    with code.count(I64(0), width) as place:
        found = value(place)
        if keep is not None:
            code.put(found, keep, place)
        bits = code.bitcast(found, I32)  # of positive numbers in order, undefined ones above all; of others below 0
        for some, peak in ((bits, peaks[0]), (code.xor(bits, SIGN), peaks[1])):
            code.store(code.most(some, code.load(peak, typ=I32)), peak)
    high, low = (code.bitcast(code.load(peak, typ=I32), FLOAT) for peak in peaks)
    span = code.fadd(high, low)
    span = code.select(code.fcmp_ordered("<", span, FLOAT(LEAST)), FLOAT(LEAST), span)
    steps, scale = code.fdiv(FLOAT(STEPS), span), code.fdiv(span, FLOAT(STEPS))
    zero = code.intrinsic("llvm.rint", FLOAT, code.fmul(low, steps))
    if factor is not None:
        scale = code.fmul(scale, factor)
    for number, mark in enumerate((scale, code.fneg(code.fmul(zero, scale)))):
        code.put(mark, marks, I64(number))
    offset, again = code.fadd(zero, FLOAT(WHOLE + 256)), value
    if keep is not None:
        again = lambda place: code.get(keep, place, FLOAT)  # noqa: E731
    with code.count(I64(0), width) as place:
        whole = code.bitcast(code.intrinsic("llvm.fma", FLOAT, again(place), steps, offset), I32)
        code.put(code.trunc(whole, BYTE), codes, place)


@contextmanager
def _rows(module: Module, name: str) -> Iterator[_Row]:
    """What a function does with each row; a thread takes one after another."""
    code, work = Code.begin(module, f"each_{name}", VOID, POINTER)
    (call,) = work.args
    with code.taken(CALL.address(code, call, "next"), CALL.get(code, call, "rows")) as place:
        yield _Row(code, call, place)
    code.ret_void()
    code, made = Code.begin(module, name, VOID, POINTER, I64)
    in_threads(code, work, *made.args)
    code.ret_void()


def as_it_is(code: Code, line: ir.Value, place: ir.Value) -> ir.Value:
    return code.get(line, place, FLOAT)


def _normed(module: Module) -> None:
    with _rows(module, "normed") as row:
        eps, gain = (CALL.get(row.code, row.call, name) for name in ("eps", "table"))
        row.encode(*normed(row.code, row.of("x", as_it_is), gain, row.width, eps))


def normed(code: Code, x: Value, gain: ir.Value, width: ir.Value, eps: ir.Value) -> tuple[Value, ir.Value]:
    """A LayerNorm without shift, of a row; its divisor only changes the scale of codes, and is the factor."""

    def total(value: Value) -> ir.Value:
        into = code.variable(FLOAT(0))
        with code.count(I64(0), width) as place:
            code.store(code.fadd(code.load(into, typ=FLOAT), value(place), flags=("reassoc",)), into)
        return code.load(into, typ=FLOAT)

    count = code.sitofp(width, FLOAT)
    mean = code.fdiv(total(x), count)

    def centred(place: ir.Value) -> ir.Value:
        return code.fsub(x(place), mean)

    variance = code.fdiv(total(lambda place: code.fmul(centred(place), centred(place))), count)
    length = code.intrinsic("llvm.sqrt", FLOAT, code.fadd(variance, eps))
    return lambda place: code.fmul(centred(place), code.get(gain, place, FLOAT)), code.fdiv(FLOAT(1), length)


def _finished(module: Module) -> None:
    with _rows(module, "finished") as row:
        row.write(row.product(), row.address("y", FLOAT))
    with _rows(module, "finished_half") as row:
        code, result = row.code, row.product()

        def narrow(place: ir.Value) -> ir.Value:
            bits = code.bitcast(as_bfloat16(code, result(place)), I32)
            return code.trunc(code.lshr(bits, I32(16)), WORD)

        row.write(narrow, row.address("y", WORD))
    with _rows(module, "added") as row:
        code, result, residual = row.code, row.product(), row.of("residual", as_it_is)
        row.write(lambda place: code.fadd(residual(place), result(place)), row.address("y", FLOAT))


def _gelu_slope(code: Code, x: ir.Value) -> ir.Value:
    """(1 + tanh(z)) / 2 is the sigmoid of 2 z."""
    cube = code.fmul(everywhere(x.type, GELU[1]), code.fmul(x, x))
    return code.fmul(everywhere(x.type, 2 * GELU[0]), code.intrinsic("llvm.fma", x.type, cube, x, x))


SIGMOIDS: dict[str, Callable[[Code, ir.Value], ir.Value]] = {  # x times the sigmoid of this
    "gelu_tanh": _gelu_slope,
    "quick_gelu": lambda code, x: code.fmul(everywhere(x.type, QUICK), x),
    "silu": lambda _, x: x,
}


def _activated(module: Module, name: str, slope: Callable[[Code, ir.Value], ir.Value]) -> None:
    """Codes of the activation of a product, whose place its values take."""
    with _rows(module, name) as row:
        code, result = row.code, row.product()

        def value(place: ir.Value) -> ir.Value:
            x = result(place)
            power = _power(code, code.fmul(slope(code, x), FLOAT(-LOG2_E)))
            return code.fdiv(x, code.fadd(FLOAT(1), power))

        row.encode(value, keep=row.address("x", FLOAT))


def _power(code: Code, x: ir.Value) -> ir.Value:
    """2^x within 3e-6 of it, between 2^-126 and 2^126: near enough for codes and half of the time of `exp2`."""
    for bound, beyond in ((126, ">"), (-126, "<")):
        x = code.select(code.fcmp_ordered(beyond, x, FLOAT(bound)), FLOAT(bound), x)
    whole = code.fadd(x, FLOAT(EVERY_ONE))
    rest, value = code.fsub(x, code.fsub(whole, FLOAT(EVERY_ONE))), FLOAT(SERIES[-1])
    for factor in reversed(SERIES[:-1]):
        value = code.intrinsic("llvm.fma", FLOAT, value, rest, FLOAT(factor))
    return code.bitcast(code.add(code.bitcast(value, I32), code.shl(code.bitcast(whole, I32), I32(23))), FLOAT)
