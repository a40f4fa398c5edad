"""Products of rows with 8-bit weights in one call: rows become codes, all threads multiply, results are scaled.

A thread takes one block of outputs after another, so that none waits for one that the system holds up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llvmlite import ir

from siglane.nn.cpu.few_rows import LEAST, LEVELS, MIDDLE, WHOLE, WIDE_LEVELS
from siglane.nn.cpu.int8_packing import OUTPUTS
from siglane.nn.cpu.jit.bfloat16 import as_bfloat16
from siglane.nn.cpu.jit.code import Code, Module, Struct, everywhere, exp2, in_threads
from siglane.nn.cpu.jit.four import write_four, write_rounded
from siglane.nn.cpu.jit.processor import Dot, Processor
from siglane.nn.cpu.jit.product import LAYER, MIDDLE_BITS, NUMBERS, REGISTERS, write_eight, write_sixteen
from siglane.nn.cpu.jit.types import BYTE, FLOAT, I32, I64, LANES, POINTER, VOID

MOST = 1024  # rows of one call
# rows that a thread takes through a block at a time: whole tiles
ROWS: Mapping[Dot, int] = {"avx512": 32, "avxvnni": 48, "avx2": 48}
ALONE = 1 << 15  # values of rows below which one thread is faster than several
SUMS = ir.VectorType(FLOAT, LANES)
BITS = {False: MIDDLE, True: MIDDLE * 256 + MIDDLE}  # of the code of zero, by `wide`
CALL = Struct(
    layer=POINTER, x=POINTER, y=POINTER, residual=POINTER, codes=POINTER, scales=POINTER, rows=I64, next=I64,
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """wide: rows of two bytes a value, all high ones and then all low ones; gated: the first half of the results goes
    through SiLU and is multiplied with the second; four: weights of 4 bits, rows of floats; coded: rows are codes,
    which count from 0."""

    name: str
    four: bool = False
    wide: bool = False
    gated: bool = False
    coded: bool = False


KINDS = (Kind("centred"), Kind("wide", wide=True), Kind("gated", gated=True))
CODED = (Kind("coded", coded=True),)
FOURS = (Kind("four", four=True), Kind("four_gated", four=True, gated=True))


def rows_module(kinds: Sequence[Kind], processor: Processor) -> Module:
    """For each kind, all of as many bits, a function of its name: layer, x float32 or codes u8 `[rows, K]`, y, residual
    like y or null, room for codes `[2 * rows, stride]`, filled up to whole tiles, rows, threads."""
    module = Module("rows", processor)
    multiply = write_four(module) if kinds[0].four else write_eight(module)
    for kind in kinds:
        encode = _encode_all(module, kind, _encoder(module, kind))
        both = write_sixteen(module) if kind.wide and processor.dot == "avx2" else None
        _layer(module, kind, encode, _work(module, kind, multiply, both, _finish(module, kind)))
    return module


def _encoder(module: Module, kind: Kind) -> ir.Function:
    if kind.four:
        return write_rounded(module, kind.name)
    return _copy(module, kind) if kind.coded else _encode(module, kind)


def _layer(module: Module, kind: Kind, encode: ir.Function, work: ir.Function) -> None:
    code, made = Code.begin(module, kind.name, VOID, *[POINTER] * 5, I64, I64)
    layer, x, y, residual, codes, rows, threads = made.args
    call = code.room(CALL.kind, 1)
    facts = (layer, x, y, residual, codes, code.room(FLOAT, MOST), rows, I64(0))
    for name, value in zip(CALL.names, facts, strict=True):
        CALL.put(code, value, call, name)
    values = code.mul(rows, LAYER.get(code, layer, "inputs"))
    in_threads(code, encode, call, code.select(code.icmp_signed("<", values, I64(ALONE)), I64(1), threads))
    CALL.put(code, I64(0), call, "next")
    in_threads(code, work, call, threads)
    code.ret_void()


def _encode_all(module: Module, kind: Kind, encode: ir.Function) -> ir.Function:
    """What each thread does first with a call: rows, until none is left. Those that are multiplied together
    lie together: their high bytes, then their low ones."""
    code, made = Code.begin(module, f"encode_all_{kind.name}", VOID, POINTER)
    (call,) = made.args
    layer, x, codes, scales, rows = (CALL.get(code, call, name) for name in ("layer", "x", "codes", "scales", "rows"))
    inputs, stride = LAYER.get(code, layer, "inputs"), LAYER.get(code, layer, "stride")
    with code.taken(CALL.address(code, call, "next"), rows) as row:
        most = I64(ROWS[module.processor.dot])
        place = code.srem(row, most)
        first = code.sub(row, place)
        high = code.at(codes, code.mul(code.add(code.mul(first, I64(2)), place), stride), BYTE)
        low = code.at(high, code.mul(code.least(code.sub(rows, first), most), stride), BYTE)
        line = code.at(x, code.mul(row, inputs), BYTE if kind.coded else FLOAT)
        code.put(code.call(encode, [layer, line, high, low]), scales, row)
    code.ret_void()
    return made


def _encode(module: Module, kind: Kind) -> ir.Function:
    """Writes a row's codes and returns its scale: layer, row, codes (the high ones), low codes."""
    code, made = Code.begin(module, f"encode_{kind.name}", FLOAT, *[POINTER] * 4)
    layer, x, codes, low = made.args
    inputs = LAYER.get(code, layer, "inputs")
    peak_bits, squares = code.variable(code.bitcast(FLOAT(LEAST), I32)), code.variable(FLOAT(0))
    with code.count(I64(0), inputs) as place:
        value = code.get(x, place, FLOAT)
        # sizes are in order as integers too, infinite and undefined ones above all others, so these stay
        size = code.and_(code.bitcast(value, I32), I32(2**31 - 1))
        code.store(code.most(size, code.load(peak_bits, typ=I32)), peak_bits)
        total = code.fadd(code.load(squares, typ=FLOAT), code.fmul(value, value), flags=("reassoc",))
        code.store(total, squares)
    levels = FLOAT(WIDE_LEVELS if kind.wide else LEVELS)
    peak = code.bitcast(code.load(peak_bits, typ=I32), FLOAT)
    step, offset = code.fdiv(levels, peak), FLOAT(WHOLE + BITS[kind.wide])
    with code.count(I64(0), inputs) as place:
        whole = code.bitcast(code.intrinsic("llvm.fma", FLOAT, code.get(x, place, FLOAT), step, offset), I32)
        if kind.wide:
            code.put(code.trunc(whole, BYTE), low, place)
            whole = code.lshr(whole, I32(8))
        code.put(code.trunc(whole, BYTE), codes, place)
    mean = code.fdiv(code.load(squares, typ=FLOAT), code.sitofp(inputs, FLOAT))
    length = code.intrinsic("llvm.sqrt", FLOAT, code.fadd(mean, LAYER.get(code, layer, "eps")))
    normed = code.icmp_signed("!=", LAYER.get(code, layer, "normed"), I64(0))
    scale = code.fdiv(peak, levels)
    code.ret(code.select(normed, code.fdiv(scale, length), scale))
    return made


def _copy(module: Module, kind: Kind) -> ir.Function:
    """The same of codes."""
    code, made = Code.begin(module, f"encode_{kind.name}", FLOAT, *[POINTER] * 4)
    layer, x, codes, _ = made.args
    with code.count(I64(0), LAYER.get(code, layer, "inputs")) as place:
        code.put(code.get(x, place, BYTE), codes, place)
    code.ret(FLOAT(1))
    return made


def _work(
    module: Module, kind: Kind, multiply: ir.Function, both: ir.Function | None, finish: ir.Function
) -> ir.Function:
    """What each thread does with a call: blocks, some rows at a time, until none is left. both: what multiplies rows of
    two bytes, where that is not two products."""
    code, made = Code.begin(module, f"work_{kind.name}", VOID, POINTER)
    (call,) = made.args
    layer, codes, rows = (CALL.get(code, call, name) for name in ("layer", "codes", "rows"))
    blocks, stride = LAYER.get(code, layer, "blocks"), LAYER.get(code, layer, "stride")
    if kind.gated:
        blocks = code.sdiv(blocks, I64(2))
    most = ROWS[module.processor.dot]
    groups = code.sdiv(code.add(rows, I64(most - 1)), I64(most))
    sums = code.room(I32, 2 * most * OUTPUTS)
    with code.taken(CALL.address(code, call, "next"), code.mul(blocks, groups)) as item:
        block, first = code.sdiv(item, groups), code.mul(code.srem(item, groups), I64(most))
        count, these = code.least(code.sub(rows, first), I64(most)), code.mul(code.mul(first, I64(2)), stride)
        these, others = code.at(codes, these, BYTE), code.at(sums, code.mul(count, I64(OUTPUTS)), I32)
        if both is not None:
            code.call(both, [layer, block, these, count, sums])
        else:
            code.call(multiply, [layer, block, these, code.mul(count, I64(2)) if kind.wide else count, sums])
        if kind.gated:
            code.call(multiply, [layer, code.add(block, blocks), these, count, others])
        code.call(finish, [call, block, first, count, sums, others])
    code.ret_void()
    return made


def _finish(module: Module, kind: Kind) -> ir.Function:
    """Writes the results of a block and some rows: call, block, the first row, how many, sums, the others: of the low
    bytes, or of what a gate is multiplied with."""
    code, made = Code.begin(module, f"finish_{kind.name}", VOID, POINTER, I64, I64, I64, POINTER, POINTER)
    call, block, first_row, rows, sums, others = made.args
    y, residual, scales = (CALL.get(code, call, name) for name in ("y", "residual", "scales"))
    layer = CALL.get(code, call, "layer")
    outputs = LAYER.get(code, layer, "outputs")
    width, first = code.sdiv(outputs, I64(2)) if kind.gated else outputs, code.mul(block, I64(OUTPUTS))
    count = code.least(code.sub(width, first), I64(OUTPUTS))
    given = code.icmp_unsigned("!=", code.ptrtoint(residual, I64), I64(0))
    own, gated = _Scaled.of(code, kind, layer, first), _Scaled.of(code, kind, layer, code.add(first, width))
    with code.count(I64(0), rows) as row:
        line, other = (code.at(some, code.mul(row, I64(OUTPUTS)), I32) for some in (sums, others))
        begin = code.add(code.mul(code.add(first_row, row), width), first)
        into, add = code.at(y, begin, FLOAT), code.at(residual, begin, FLOAT)
        factor = code.get(scales, code.add(first_row, row), FLOAT)

        def plus(value: ir.Value, place: ir.Value) -> ir.Value:
            total = code.variable(value)
            with code.if_then(given):
                code.store(code.fadd(value, code.get(add, place, value.type, 4)), total)
            return code.load(total, typ=value.type)

        results = [own(factor, line, other, number) for number in range(REGISTERS)]
        if kind.gated:
            factors = [gated(factor, other, other, number) for number in range(REGISTERS)]
            results = [code.fmul(silu(code, x), y) for x, y in zip(results, factors, strict=True)]
        with code.if_else(code.icmp_signed("==", count, I64(OUTPUTS))) as (whole, part):
            with whole:
                for number, value in enumerate(results):
                    code.put(plus(value, I64(number)), into, I64(number), 4)
            with part:
                for number, value in enumerate(results):
                    code.put(value, line, I64(number), 4)
                with code.count(I64(0), count) as place:
                    code.put(plus(code.get(line, place, FLOAT), place), into, place)
    code.ret_void()
    return made


@dataclass(frozen=True)
class _Scaled:
    """Results of a block. scale, bias, tail: addresses of its own."""

    code: Code
    kind: Kind
    scale: ir.Value
    bias: ir.Value
    tail: ir.Value | None

    @classmethod
    def of(cls, code: Code, kind: Kind, layer: ir.Value, first: ir.Value) -> _Scaled:
        """first: the block's first output."""
        scale, bias = (code.at(LAYER.get(code, layer, name), first, FLOAT) for name in ("scale", "bias"))
        tail = code.at(LAYER.get(code, layer, "tail"), first, I32) if kind.coded else None
        return cls(code, kind, scale, bias, tail)

    def __call__(self, factor: ir.Value, sums: ir.Value, low: ir.Value, number: int) -> ir.Value:
        """A register of results of a row, whose scale is `factor`."""
        code, place = self.code, I64(number)
        bias = code.get(self.bias, place, SUMS, 4)
        if self.kind.four:
            return code.fadd(as_bfloat16(code, code.get(sums, place, SUMS, 4)), bias)  # as many rows come out
        whole = code.get(sums, place, NUMBERS, 4)
        if self.kind.coded:
            negative = code.get(self.tail, place, NUMBERS, 4)
            whole = code.sub(whole, code.shl(negative, everywhere(NUMBERS, MIDDLE_BITS)))
        total = code.sitofp(whole, SUMS)
        if self.kind.wide:
            rest = code.sitofp(code.get(low, place, NUMBERS, 4), SUMS)
            total = code.intrinsic("llvm.fma", SUMS, total, everywhere(SUMS, 256), rest)
        scale = code.fmul(code.get(self.scale, place, SUMS, 4), code.spread(factor, LANES))
        return code.intrinsic("llvm.fma", SUMS, total, scale, bias)


def silu(code: Code, x: ir.Value) -> ir.Value:
    """`x / (1 + e^-x)` of a register."""
    power = exp2(code, code.fmul(x, everywhere(x.type, -math.log2(math.e))))
    return code.fdiv(x, code.fadd(everywhere(x.type, 1), power))
