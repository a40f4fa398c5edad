"""The product of rows with one block of a 4-bit weight, as torch packs it: 64 outputs, one input after another, in 32
bytes each, whose low halves are the first 32 outputs' codes (`int4.unpack_codes`).

Rows are bfloat16's numbers, and behind them the sum of each group's. Two inputs are multiplied at a time.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from llvmlite import ir

from siglane.nn.cpu.int8_packing import OUTPUTS
from siglane.nn.cpu.jit.bfloat16 import SUMS, WORD, add_pairs, as_bfloat16, as_float
from siglane.nn.cpu.jit.code import Code, Module, call_one, everywhere
from siglane.nn.cpu.jit.product import LAYER, REGISTERS
from siglane.nn.cpu.jit.tiles import AHEAD
from siglane.nn.cpu.jit.types import BYTE, FLOAT, I32, I64, LANES, POINTER, VOID

HALF = OUTPUTS // 2
BYTES, WORDS = ir.VectorType(BYTE, 4 * LANES), ir.VectorType(WORD, 2 * LANES)
NUMBERS = ir.VectorType(I32, LANES)
TILE = 4  # rows that are multiplied together
CODE_MIDDLE = 8.0  # that the stored middle counts from
GROUPS_AHEAD = 2  # whose scales are called from memory
# (weights of two inputs, a register for every 16 outputs; the row's two numbers) -> what is added to a register
Multiply = Callable[[Code, ir.Value, ir.Value, ir.Value], ir.Value]


def write_four(module: Module) -> ir.Function:
    """`function(layer, block, x, rows, sums)`: x as `write_rounded` leaves it, `[rows, stride]` -> sums float32
    `[rows, 64]`."""
    functions = {rows: _tile(module, rows) for rows in range(1, TILE + 1)}
    code, made = Code.begin(module, "four_block", VOID, POINTER, I64, POINTER, I64, POINTER)
    layer, block, x, rows, into = made.args
    stride = LAYER.get(code, layer, "stride")
    with code.count(I64(0), rows, TILE) as row:
        these, there = code.at(x, code.mul(row, stride), BYTE), code.at(into, code.mul(row, I64(OUTPUTS)), FLOAT)
        call_one(code, functions, code.sub(rows, row), [layer, block, these, stride, there])
    code.ret_void()
    return made


def _tile(module: Module, rows: int) -> ir.Function:
    code, made = Code.begin(module, f"four_tile{rows}", VOID, POINTER, I64, POINTER, I64, POINTER)
    layer, block, x, stride, into = made.args
    inputs, group = code.sdiv(stride, I64(4)), LAYER.get(code, layer, "group")
    outputs = code.mul(LAYER.get(code, layer, "blocks"), I64(OUTPUTS))
    codes = code.at(LAYER.get(code, layer, "packed"), code.mul(code.mul(block, inputs), I64(HALF)), BYTE)
    pairs = code.at(LAYER.get(code, layer, "tail"), code.mul(block, I64(OUTPUTS)), I32)
    lines = [code.at(x, code.mul(stride, I64(row)), BYTE) for row in range(rows)]
    zero = everywhere(SUMS, 0.0)
    totals = [[code.variable(zero) for _ in range(REGISTERS)] for _ in range(rows)]
    unpack, multiply = (_narrow, _multiply_narrow) if module.processor.bfloat16 else (_wide, _multiply_wide)
    with code.count(I64(0), code.sdiv(inputs, group)) as number:
        sums = [[code.variable(zero) for _ in range(REGISTERS)] for _ in range(rows)]
        first = code.sdiv(code.mul(number, group), I64(2))
        with code.count(first, code.add(first, code.sdiv(group, I64(2)))) as place:
            address = code.at(codes, place, BYTES)
            code.prefetch(code.at(address, I64(AHEAD), BYTE))
            weights = unpack(code, code.load(address, typ=BYTES, align=1))
            for line, slots in zip(lines, sums, strict=True):
                both = code.spread(code.get(line, place, I32), LANES)
                for weight, slot in zip(weights, slots, strict=True):
                    code.store(multiply(code, weight, both, code.load(slot, typ=SUMS)), slot)
        here = code.at(pairs, code.mul(number, outputs), I32)
        for register in range(REGISTERS):
            code.prefetch(code.at(here, code.add(code.mul(outputs, I64(GROUPS_AHEAD)), I64(register * LANES)), I32))
        scales = [_scale(code, here, register) for register in range(REGISTERS)]
        for line, slots, into_slots in zip(lines, sums, totals, strict=True):
            share = code.get(line, code.add(code.sdiv(inputs, I64(2)), number), FLOAT)
            for (scale, shift), slot, total in zip(scales, slots, into_slots, strict=True):
                added = code.load(total, typ=SUMS)
                for one, other in ((code.load(slot, typ=SUMS), scale), (shift, code.spread(share, LANES))):
                    added = code.intrinsic("llvm.fma", SUMS, one, other, added)
                code.store(added, total)
    for place, total in enumerate(total for slots in totals for total in slots):
        code.put(code.load(total, typ=SUMS), into, I64(place), 4)
    code.ret_void()
    return made


def _scale(code: Code, pairs: ir.Value, register: int) -> tuple[ir.Value, ir.Value]:
    """Of a group's outputs the scale, and what stands for code 0."""
    both = code.get(pairs, I64(register), NUMBERS, 4)
    scale, middle = (code.bitcast(half, SUMS) for half in _halves(code, both))
    return scale, code.intrinsic("llvm.fma", SUMS, scale, everywhere(SUMS, -CODE_MIDDLE), middle)


def _halves(code: Code, both: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Two numbers of bfloat16 in each lane as float32's bits."""
    return code.shl(both, everywhere(NUMBERS, 16)), code.and_(both, everywhere(NUMBERS, -(1 << 16)))


def _narrow(code: Code, pairs: ir.Value) -> list[ir.Value]:
    """Weights of two inputs: lanes of two numbers of bfloat16. A code finds its own in a table of two times sixteen, so
    that it does not matter which bit stands before it."""
    table = ir.Constant(WORDS, [_bits(number % 16) for number in range(2 * LANES)])
    look_up = code.declared("llvm.x86.avx512.permvar.hi.512", WORDS, WORDS, WORDS)
    low, high = list[ir.Value](), list[ir.Value]()
    for first in range(0, HALF, LANES):
        places = [
            place for output in range(first, first + LANES) for place in (output, output, HALF + output, HALF + output)
        ]
        words = code.bitcast(code.shuffle_vector(pairs, pairs, ir.Constant(ir.VectorType(I32, 64), places)), WORDS)
        low.append(code.call(look_up, [table, words]))
        high.append(code.call(look_up, [table, code.lshr(words, everywhere(WORDS, 4))]))
    return low + high


def _multiply_narrow(code: Code, weights: ir.Value, both: ir.Value, total: ir.Value) -> ir.Value:
    return add_pairs(code, total, weights, both)


def _wide(code: Code, pairs: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
    """Weights of two inputs as floats."""
    found = list[list[ir.Value]]()
    for first in (0, HALF):
        made = list[ir.Value]()
        for half in (0, LANES):
            places = ir.Constant(NUMBERS, [first + half + lane for lane in range(LANES)])
            wide = code.zext(code.shuffle_vector(pairs, pairs, places), NUMBERS)
            made.append(wide)
        low = [code.and_(wide, everywhere(NUMBERS, 15)) for wide in made]
        high = [code.lshr(wide, everywhere(NUMBERS, 4)) for wide in made]
        found.append([code.sitofp(whole, SUMS) for whole in (*low, *high)])
    return list(zip(*found, strict=True))


def _multiply_wide(code: Code, weights: tuple[ir.Value, ir.Value], both: ir.Value, total: ir.Value) -> ir.Value:
    for weight, half in zip(weights, _halves(code, both), strict=True):
        total = code.intrinsic("llvm.fma", SUMS, weight, code.bitcast(half, SUMS), total)
    return total


def write_rounded(module: Module, name: str) -> ir.Function:
    """A row as the product takes it, normed and rounded to bfloat16, then each group's sum: layer, row, into, (nothing)
    -> 1."""
    code, made = Code.begin(module, f"encode_{name}", FLOAT, *[POINTER] * 4)
    layer, x, into, _ = made.args
    inputs, squares = LAYER.get(code, layer, "inputs"), code.variable(FLOAT(0))
    filled, group = code.sdiv(LAYER.get(code, layer, "stride"), I64(4)), LAYER.get(code, layer, "group")
    with code.count(I64(0), inputs) as place:
        value = code.get(x, place, FLOAT)
        total = code.fadd(code.load(squares, typ=FLOAT), code.fmul(value, value), flags=("reassoc",))
        code.store(total, squares)
    mean = code.fdiv(code.load(squares, typ=FLOAT), code.sitofp(inputs, FLOAT))
    length = code.intrinsic("llvm.sqrt", FLOAT, code.fadd(mean, LAYER.get(code, layer, "eps")))
    normed = code.icmp_signed("!=", LAYER.get(code, layer, "normed"), I64(0))
    factor = code.select(normed, code.fdiv(FLOAT(1), length), FLOAT(1))
    with code.count(I64(0), inputs) as place:
        bits = code.bitcast(as_bfloat16(code, code.fmul(code.get(x, place, FLOAT), factor)), I32)
        code.put(code.trunc(code.lshr(bits, I32(16)), WORD), into, place)
    with code.count(inputs, filled) as place:
        code.put(WORD(0), into, place)
    with code.count(I64(0), code.sdiv(filled, group)) as number:
        share, first = code.variable(FLOAT(0)), code.mul(number, group)
        with code.count(first, code.add(first, group)) as place:
            value = as_float(code, into, place)
            code.store(code.fadd(code.load(share, typ=FLOAT), value, flags=("reassoc",)), share)
        code.put(code.load(share, typ=FLOAT), into, code.add(code.sdiv(filled, I64(2)), number))
    code.ret(FLOAT(1))
    return made


def _bits(value: int) -> int:
    """Of a small whole number in bfloat16."""
    return int.from_bytes(struct.pack(">f", value)[:2], "big")
