"""The product of float rows with one block of a 4-bit weight, as torch packs it: 64 outputs, one input after another,
in 32 bytes each, whose low halves are the first 32 outputs' codes (`int4.unpack_codes`)."""

from __future__ import annotations

from functools import partial

from llvmlite import ir

from siglane.nn.cpu.int8_packing import OUTPUTS
from siglane.nn.cpu.jit.code import BYTE, FLOAT, I32, I64, POINTER, VOID, Code, everywhere
from siglane.nn.cpu.jit.product import LAYER, call_one

HALF = OUTPUTS // 2
NUMBERS, SUMS = ir.VectorType(I32, OUTPUTS), ir.VectorType(FLOAT, OUTPUTS)
TILE = 4  # rows that are multiplied together
CODE_MIDDLE = 8.0  # that the stored middle counts from


def write_four(module: ir.Module) -> ir.Function:
    """`function(layer, block, x, rows, sums)`: x float32 `[rows, stride / 4]` -> sums float32 `[rows, 64]`."""
    functions = {rows: _tile(module, rows) for rows in range(1, TILE + 1)}
    code, made = Code.begin(module, "four_block", VOID, POINTER, I64, POINTER, I64, POINTER)
    layer, block, x, rows, into = made.args
    stride = LAYER.get(code, layer, "stride")
    with code.count(I64(0), rows, TILE) as row:
        these, there = code.at(x, code.mul(row, stride), BYTE), code.at(into, code.mul(row, I64(OUTPUTS)), FLOAT)
        call_one(code, functions, code.sub(rows, row), [layer, block, these, stride, there])
    code.ret_void()
    return made


def _tile(module: ir.Module, rows: int) -> ir.Function:
    code, made = Code.begin(module, f"four_tile{rows}", VOID, POINTER, I64, POINTER, I64, POINTER)
    layer, block, x, stride, into = made.args
    inputs, group = code.sdiv(stride, I64(4)), LAYER.get(code, layer, "group")
    outputs = code.mul(LAYER.get(code, layer, "blocks"), I64(OUTPUTS))
    codes = code.at(LAYER.get(code, layer, "packed"), code.mul(code.mul(block, inputs), I64(HALF)), BYTE)
    pairs = code.at(LAYER.get(code, layer, "tail"), code.mul(block, I64(OUTPUTS)), I32)
    lines = [code.at(x, code.mul(stride, I64(row)), BYTE) for row in range(rows)]
    zeros = ir.Constant(SUMS, [0.0] * OUTPUTS)
    totals = [code.variable(zeros) for _ in range(rows)]
    with code.count(I64(0), code.sdiv(inputs, group)) as number:
        sums, shares = [code.variable(zeros) for _ in range(rows)], [code.variable(FLOAT(0)) for _ in range(rows)]
        first = code.mul(number, group)
        with code.count(first, code.add(first, group)) as place:
            weights = _codes(code, code.at(codes, code.mul(place, I64(HALF)), BYTE))
            for line, slot, share in zip(lines, sums, shares, strict=True):
                value = code.get(line, place, FLOAT)
                everywhere = code.spread(value, OUTPUTS)
                code.store(code.intrinsic("llvm.fma", SUMS, weights, everywhere, code.load(slot, typ=SUMS)), slot)
                code.store(code.fadd(code.load(share, typ=FLOAT), value), share)
        both = code.load(code.at(pairs, code.mul(number, outputs), I32), typ=NUMBERS, align=4)
        scale = code.bitcast(code.shl(both, ir.Constant(NUMBERS, [16] * OUTPUTS)), SUMS)
        middle = code.bitcast(code.and_(both, ir.Constant(NUMBERS, [-(1 << 16)] * OUTPUTS)), SUMS)
        shift = code.intrinsic("llvm.fma", SUMS, scale, ir.Constant(SUMS, [-CODE_MIDDLE] * OUTPUTS), middle)
        for slot, share, total in zip(sums, shares, totals, strict=True):
            added = code.intrinsic("llvm.fma", SUMS, code.load(slot, typ=SUMS), scale, code.load(total, typ=SUMS))
            everywhere = code.spread(code.load(share, typ=FLOAT), OUTPUTS)
            code.store(code.intrinsic("llvm.fma", SUMS, shift, everywhere, added), total)
    for row, total in enumerate(totals):
        code.put(code.load(total, typ=SUMS), into, I64(row), 4)
    code.ret_void()
    return made


def _codes(code: Code, address: ir.Value) -> ir.Value:
    """Of one input, all outputs', as floats."""
    pairs = code.load(address, typ=ir.VectorType(BYTE, HALF), align=1)
    wide = code.zext(pairs, ir.VectorType(I32, HALF))
    low = code.and_(wide, ir.Constant(wide.type, [15] * HALF))
    high = code.lshr(wide, ir.Constant(wide.type, [4] * HALF))
    whole = code.shuffle_vector(low, high, ir.Constant(NUMBERS, list(range(OUTPUTS))))
    return code.sitofp(whole, SUMS)


def write_rounded(module: ir.Module, name: str) -> ir.Function:
    """A row as the product takes it, normed and rounded to bfloat16's numbers: layer, row, into, (nothing) -> 1."""
    code, made = Code.begin(module, f"encode_{name}", FLOAT, *[POINTER] * 4)
    layer, x, into, _ = made.args
    inputs, squares = LAYER.get(code, layer, "inputs"), code.variable(FLOAT(0))
    with code.count(I64(0), inputs) as place:
        value = code.get(x, place, FLOAT)
        total = code.fadd(code.load(squares, typ=FLOAT), code.fmul(value, value), flags=("reassoc",))
        code.store(total, squares)
    mean = code.fdiv(code.load(squares, typ=FLOAT), code.sitofp(inputs, FLOAT))
    length = code.intrinsic("llvm.sqrt", FLOAT, code.fadd(mean, LAYER.get(code, layer, "eps")))
    normed = code.icmp_signed("!=", LAYER.get(code, layer, "normed"), I64(0))
    factor = code.select(normed, code.fdiv(FLOAT(1), length), FLOAT(1))
    with code.count(I64(0), inputs) as place:
        code.put(as_bfloat16(code, code.fmul(code.get(x, place, FLOAT), factor)), into, place)
    with code.count(inputs, code.sdiv(LAYER.get(code, layer, "stride"), I64(4))) as place:
        code.put(FLOAT(0), into, place)
    code.ret(FLOAT(1))
    return made


def as_bfloat16(code: Code, x: ir.Value) -> ir.Value:
    """Float32 rounded to a number of bfloat16, the even one of two that are as near."""
    kind = ir.VectorType(I32, x.type.count) if isinstance(x.type, ir.VectorType) else I32
    bits, number = code.bitcast(x, kind), partial(everywhere, kind)
    even = code.add(code.and_(code.lshr(bits, number(16)), number(1)), number(2**15 - 1))
    return code.bitcast(code.and_(code.add(bits, even), number(-(1 << 16))), x.type)
