"""The product of codes with one block of an 8-bit weight, in the order of `int8_packing.py`: 64 outputs, in which four
inputs of one output lie together. VNNI's instruction multiplies those with four codes of a row and adds them up; what
stands for it elsewhere is in `avx2.py`."""

from __future__ import annotations

from llvmlite import ir

from siglane.nn.cpu.int8_packing import OUTPUTS, TOGETHER
from siglane.nn.cpu.jit.avx2 import write_dots, write_words
from siglane.nn.cpu.jit.code import Code, Module, Struct, call_one, everywhere
from siglane.nn.cpu.jit.tiles import AHEAD, LEAST_ROWS, LINE, write_tiles
from siglane.nn.cpu.jit.types import BYTE, FLOAT, I32, I64, LANES, POINTER, VOID

REGISTERS = OUTPUTS // LANES  # of one row of a block
TILE = 6  # rows that are multiplied together, as many as registers allow
PART = 128  # inputs of a block that all rows pass through before the next: their weights stay in the nearest cache
NUMBERS = ir.VectorType(I32, LANES)
MIDDLE_BITS = 7  # of the codes' zero, 128

# what stays the same from call to call. packed: weights; tail: i32 `[blocks * 64]`, the negative sum of each output's
# codes; scale, bias: filled up to whole blocks; stride: bytes of a row of codes; normed: whether an RMSNorm with `eps`
# stands before the layer; of 4 bits tail: scales and middles bfloat16 `[groups, blocks * 64, 2]`; group: inputs of one
LAYER = Struct(
    packed=POINTER, tail=POINTER, scale=POINTER, bias=POINTER,
    outputs=I64, inputs=I64, stride=I64, blocks=I64, normed=I64, eps=FLOAT, group=I64,
)  # fmt: skip


def write_eight(module: Module) -> ir.Function:
    """`function(layer, block, codes, rows, sums)`: codes u8 `[rows, stride]` around 128 -> sums i32 `[rows, 64]`. Where
    the processor multiplies tiles, of LEAST_ROWS or more both are filled up to whole tiles."""
    processor = module.processor
    code, made = Code.begin(module, "eight_block", VOID, POINTER, I64, POINTER, I64, POINTER)
    layer, block, codes, rows, into = made.args
    first, stride = code.mul(block, I64(OUTPUTS)), LAYER.get(code, layer, "stride")
    weights = code.at(LAYER.get(code, layer, "packed"), code.mul(first, stride), BYTE)
    if processor.dot == "avx2":
        code.call(write_words(module, wide=False), [weights, codes, stride, rows, into])
        code.ret_void()
        return made
    tail = code.at(LAYER.get(code, layer, "tail"), first, I32)
    zeros = [code.shl(code.get(tail, I64(n), NUMBERS, 4), everywhere(NUMBERS, MIDDLE_BITS)) for n in range(REGISTERS)]
    if processor.tiles:
        with code.if_then(code.icmp_signed(">=", rows, I64(LEAST_ROWS))):
            code.call(write_tiles(module), [weights, codes, stride, rows, into, *zeros])
            code.ret_void()
    with code.count(I64(0), rows) as row:
        for number, zero in enumerate(zeros):
            code.put(zero, into, code.add(code.mul(row, I64(REGISTERS)), I64(number)), 4)
    tile = _tile if processor.dot == "avx512" else write_dots
    functions = {count: tile(module, count) for count in range(1, TILE + 1)}
    with code.count(I64(0), stride, PART) as start, code.count(I64(0), rows, TILE) as row:
        part = code.at(weights, code.mul(start, I64(OUTPUTS)), BYTE)
        these = code.at(codes, code.add(code.mul(row, stride), start), BYTE)
        size = code.least(code.sub(stride, start), I64(PART))
        there = code.at(into, code.mul(row, I64(OUTPUTS)), I32)
        call_one(code, functions, code.sub(rows, row), [part, these, stride, size, there])
    code.ret_void()
    return made


def write_sixteen(module: Module) -> ir.Function:
    """The same of rows of two bytes a value: codes u8 `[2 * rows, stride]`, all high ones and then all low ones -> sums
    i32 `[2 * rows, 64]`, whose first half, times 256, and second are to be added. It takes words (AVX2)."""
    code, made = Code.begin(module, "sixteen_block", VOID, POINTER, I64, POINTER, I64, POINTER)
    layer, block, codes, rows, into = made.args
    stride = LAYER.get(code, layer, "stride")
    weights = code.at(LAYER.get(code, layer, "packed"), code.mul(code.mul(block, I64(OUTPUTS)), stride), BYTE)
    code.call(write_words(module, wide=True), [weights, codes, stride, rows, into])
    code.ret_void()
    return made


def _tile(module: Module, rows: int) -> ir.Function:
    """Adds `size` inputs' products to `into`."""
    code, made = Code.begin(module, f"eight_tile{rows}", VOID, POINTER, POINTER, I64, I64, POINTER)
    weights, codes, stride, size, into = made.args
    places = [[I64(row * REGISTERS + number) for number in range(REGISTERS)] for row in range(rows)]
    sums = [[code.variable(code.get(into, place, NUMBERS, 4)) for place in of_row] for of_row in places]
    lines = [code.at(codes, code.mul(stride, I64(row)), BYTE) for row in range(rows)]
    dot = code.declared("llvm.x86.avx512.vpdpbusd.512", *[NUMBERS] * 4)
    with code.count(I64(0), code.sdiv(size, I64(TOGETHER))) as place:
        address = code.at(weights, code.mul(place, I64(OUTPUTS * TOGETHER)), BYTE)
        parts = [code.get(address, I64(n), NUMBERS, 64) for n in range(REGISTERS)]
        for number in range(REGISTERS):
            code.prefetch(code.at(address, I64(AHEAD + number * LINE), BYTE))
        for line, slots in zip(lines, sums, strict=True):
            four = code.spread(code.get(line, place, I32, 1), LANES)
            for part, slot in zip(parts, slots, strict=True):
                code.store(code.call(dot, [code.load(slot, typ=NUMBERS), four, part]), slot)
    for of_row, slots in zip(places, sums, strict=True):
        for place, slot in zip(of_row, slots, strict=True):
            code.put(code.load(slot, typ=NUMBERS), into, place, 4)
    code.ret_void()
    return made
