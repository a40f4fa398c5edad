"""Numbers of bfloat16 in loops."""

from __future__ import annotations

from functools import partial

from llvmlite import ir

from siglane.nn.cpu.jit.code import Code, everywhere
from siglane.nn.cpu.jit.types import FLOAT, I32, LANES

WORD = ir.IntType(16)  # one's bits
SUMS = ir.VectorType(FLOAT, LANES)


class _Bfloat(ir.Type):  # type: ignore[misc]
    """Which llvmlite has no name for."""

    def __str__(self) -> str:
        return "bfloat"


PAIRS, HALF_REGISTER = ir.VectorType(_Bfloat(), 2 * LANES), ir.VectorType(_Bfloat(), LANES)


def add_pairs(code: Code, total: ir.Value, one: ir.Value, other: ir.Value) -> ir.Value:
    """To each lane of `total`, a register of float32, the products of two numbers: registers of pairs, of any type. It
    takes AVX512-BF16, as the next one does."""
    dot = code.declared("llvm.x86.avx512bf16.dpbf16ps.512", SUMS, SUMS, PAIRS, PAIRS)
    return code.call(dot, [total, code.bitcast(one, PAIRS), code.bitcast(other, PAIRS)])


def rounded(code: Code, x: ir.Value) -> ir.Value:
    """A register of float32 as the bits of bfloat16."""
    convert = code.declared("llvm.x86.avx512bf16.cvtneps2bf16.512", HALF_REGISTER, SUMS)
    return code.bitcast(code.call(convert, [x]), ir.VectorType(WORD, LANES))


def as_bfloat16(code: Code, x: ir.Value) -> ir.Value:
    """Float32 rounded to a number of bfloat16, the even one of two that are as near."""
    kind = ir.VectorType(I32, x.type.count) if isinstance(x.type, ir.VectorType) else I32
    bits, number = code.bitcast(x, kind), partial(everywhere, kind)
    even = code.add(code.and_(code.lshr(bits, number(16)), number(1)), number(2**15 - 1))
    return code.bitcast(code.and_(code.add(bits, even), number(-(1 << 16))), x.type)


def as_float(code: Code, line: ir.Value, place: ir.Value) -> ir.Value:
    """The number of bfloat16 in a place of a row."""
    return code.bitcast(code.shl(code.zext(code.get(line, place, WORD), I32), I32(16)), FLOAT)
