"""The product of `product.py` in registers of 256 bits, of which there are sixteen.

AVX-VNNI has its instruction for them. AVX2 has none that adds products of bytes up without an overflow; it multiplies
words. There codes become words around zero, some inputs of some rows at a time, and weights where they are read; a
register then has two pairs of products of each of four outputs. A word holds a row's two bytes too, which thus cost as
much as one.
"""

from __future__ import annotations

from llvmlite import ir

from siglane.nn.cpu.int8_packing import OUTPUTS, TOGETHER
from siglane.nn.cpu.jit.bfloat16 import WORD
from siglane.nn.cpu.jit.code import Code, Module, call_one, everywhere
from siglane.nn.cpu.jit.tiles import AHEAD, LINE
from siglane.nn.cpu.jit.types import BYTE, I32, I64, POINTER, VOID

LANES = 8  # 32-bit numbers of a register
NUMBERS, WORDS, BYTES = (ir.VectorType(kind, count) for kind, count in ((I32, LANES), (WORD, 16), (BYTE, 16)))
STEP = OUTPUTS * TOGETHER  # bytes of weights of four inputs
PART = 128  # inputs whose codes are words at a time: with their weights they stay in the nearest cache
MANY = 48  # rows whose codes are
MIDDLE = -128  # a byte's highest bit: changing it takes 128 off a code
OF_DOT = {1: 8, 2: 4, 3: 4, 4: 2, 5: 2, 6: 2}  # rows that are multiplied together -> registers of sums each has
OF_WORDS = {1: 8, 2: 4, 3: 4, 4: 2, 5: 2, 6: 2}


def write_dots(module: Module, rows: int) -> ir.Function:
    """`function(weights, codes, stride, size, sums)`: adds products of `size` inputs, by AVX-VNNI."""
    code, made = Code.begin(module, f"eight_tile{rows}", VOID, POINTER, POINTER, I64, I64, POINTER)
    weights, codes, stride, size, into = made.args
    lines = [code.at(codes, code.mul(stride, I64(row)), BYTE) for row in range(rows)]
    dot, count = code.declared("llvm.x86.avx512.vpdpbusd.256", *[NUMBERS] * 4), OF_DOT[rows]
    with code.count(I64(0), I64(OUTPUTS // LANES), count) as first:
        these = code.at(weights, first, NUMBERS)
        sums = [
            code.at(into, code.add(first, I64(row * OUTPUTS // LANES + n)), NUMBERS)
            for row in range(rows)
            for n in range(count)
        ]
        slots = [code.variable(code.load(place, typ=NUMBERS, align=4)) for place in sums]
        with code.count(I64(0), code.sdiv(size, I64(TOGETHER))) as place:
            address = _called(code, these, place, count * LANES * TOGETHER)
            parts = [code.get(address, I64(n), NUMBERS, 32) for n in range(count)]
            for row, line in enumerate(lines):
                four = code.spread(code.get(line, place, I32, 1), LANES)
                for part, slot in zip(parts, slots[row * count :], strict=False):
                    code.store(code.call(dot, [code.load(slot, typ=NUMBERS), four, part]), slot)
        for place, slot in zip(sums, slots, strict=True):
            code.store(code.load(slot, typ=NUMBERS), place, align=4)
    code.ret_void()
    return made


def write_words(module: Module, *, wide: bool) -> ir.Function:
    """`function(weights, codes, stride, rows, sums)`: weights of a block, codes u8 `[rows, stride]` -> sums i32 `[rows,
    64]`. wide: as of `write_sixteen`."""
    name = "wide" if wide else "narrow"
    code, made = Code.begin(module, f"{name}_words", VOID, POINTER, POINTER, I64, I64, POINTER)
    weights, codes, stride, rows, into = made.args
    functions = {count: _tile(module, name, count) for count in OF_WORDS}
    words, widen = code.room(WORD, MANY * PART), _widen(module, name)
    zero, of_row = everywhere(NUMBERS, 0), OUTPUTS // LANES
    with code.count(I64(0), code.mul(rows, I64((1 + wide) * of_row))) as place:
        code.put(zero, into, place, 4)
    with code.count(I64(0), stride, PART) as start, code.count(I64(0), rows, MANY) as some:
        size, here = code.least(code.sub(stride, start), I64(PART)), code.least(code.sub(rows, some), I64(MANY))
        these = code.at(codes, code.add(code.mul(some, stride), start), BYTE)
        low = code.at(these, code.mul(rows, stride), BYTE)
        code.call(widen, [these, low, stride, here, size, words])
        part = code.at(weights, code.mul(start, I64(OUTPUTS)), BYTE)
        with code.count(I64(0), here, max(OF_WORDS)) as row:
            there = code.at(into, code.mul(code.add(some, row), I64(OUTPUTS)), I32)
            low = code.at(there, code.mul(rows, I64(OUTPUTS)), I32)
            own = code.at(words, code.mul(row, I64(PART)), WORD)
            call_one(code, functions, code.sub(here, row), [part, own, size, there, low])
    code.ret_void()
    return made


def _widen(module: Module, name: str) -> ir.Function:
    """Codes, their low bytes where they are wide, stride, rows, inputs, into: words `[rows, PART]`."""
    code, made = Code.begin(module, f"{name}_widen", VOID, *[POINTER] * 2, *[I64] * 3, POINTER)
    codes, low, stride, rows, size, into = made.args

    def around_zero(line: ir.Value, place: ir.Value) -> ir.Value:
        code.prefetch(code.at(line, code.add(place, I64(PART)), BYTE))  # the next ones, of a row somewhere else
        some = code.load(code.at(line, place, BYTE), typ=BYTES, align=1)
        return code.sext(code.xor(some, everywhere(BYTES, MIDDLE)), WORDS)

    with code.count(I64(0), rows) as row:
        first, line = code.mul(row, stride), code.at(into, code.mul(row, I64(PART)), WORD)
        with code.count(I64(0), size, WORDS.count) as place:
            value = around_zero(code.at(codes, first, BYTE), place)
            if name == "wide":
                value = code.add(code.shl(value, everywhere(WORDS, 8)), around_zero(code.at(low, first, BYTE), place))
            code.store(value, code.at(line, place, WORD), align=32)
    code.ret_void()
    return made


def _tile(module: Module, name: str, rows: int) -> ir.Function:
    """Weights, words `[rows, PART]`, inputs, sums, those of low bytes: adds products to both, to the second where rows
    are wide."""
    code, made = Code.begin(module, f"{name}_tile{rows}", VOID, *[POINTER] * 2, I64, *[POINTER] * 2)
    weights, words, size, into, low = made.args
    multiply, count = code.declared("llvm.x86.avx2.pmadd.wd", NUMBERS, WORDS, WORDS), OF_WORDS[rows]
    with code.count(I64(0), I64(OUTPUTS // 4), count) as first:  # four outputs each
        these, zero = code.at(weights, first, BYTES), everywhere(NUMBERS, 0)
        sums = [[code.variable(zero) for _ in range(count)] for _ in range(rows)]
        with code.count(I64(0), code.sdiv(size, I64(TOGETHER))) as place:
            address = _called(code, these, place, count * BYTES.count)
            parts = [code.sext(code.get(address, I64(n), BYTES, 16), WORDS) for n in range(count)]
            for row, slots in enumerate(sums):
                four = code.get(code.at(words, I64(row * PART), WORD), place, I64)
                four = code.bitcast(code.spread(four, 4), WORDS)
                for part, slot in zip(parts, slots, strict=True):
                    code.store(code.add(code.load(slot, typ=NUMBERS), code.call(multiply, [part, four])), slot)
        for row, slots in enumerate(sums):
            for n in range(0, count, 2):
                place = code.add(code.sdiv(first, I64(2)), I64(row * OUTPUTS // LANES + n // 2))
                total = _pairs_of(code, *(code.load(slot, typ=NUMBERS) for slot in slots[n : n + 2]))
                if name == "wide":
                    _add(code, code.and_(total, everywhere(NUMBERS, 255)), low, place)
                    total = code.ashr(total, everywhere(NUMBERS, 8))
                _add(code, total, into, place)
    code.ret_void()
    return made


def _called(code: Code, weights: ir.Value, place: ir.Value, size: int) -> ir.Value:
    """Where `size` bytes of weights of four inputs begin; later ones are called from memory."""
    address = code.at(weights, code.mul(place, I64(STEP)), BYTE)
    for line in range(0, size, LINE):
        code.prefetch(code.at(address, I64(AHEAD + line), BYTE))
    return address


def _pairs_of(code: Code, one: ir.Value, other: ir.Value) -> ir.Value:
    """The sums of neighbours of two registers, one after another."""
    halves = (ir.Constant(NUMBERS, list(range(first, 2 * LANES, 2))) for first in (0, 1))
    return code.add(*(code.shuffle_vector(one, other, half) for half in halves))


def _add(code: Code, value: ir.Value, into: ir.Value, place: ir.Value) -> None:
    code.put(code.add(code.get(into, place, value.type, 4), value), into, place, 4)
