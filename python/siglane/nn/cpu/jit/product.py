"""The product of codes with one block of an 8-bit weight, in the order of `int8_packing.py`: 64 outputs, in which four
inputs of one output lie together. VNNI's instruction multiplies those with four codes of a row and adds them up."""

from __future__ import annotations

from llvmlite import ir

from siglane.nn.cpu.int8_packing import OUTPUTS, TOGETHER
from siglane.nn.cpu.jit.code import BYTE, FLOAT, I32, I64, POINTER, VOID, Code, Struct

LANES = 16  # 32-bit numbers of one register
REGISTERS = OUTPUTS // LANES  # of one row of a block
TILE = 4  # rows that are multiplied together, as many as registers allow
NUMBERS = ir.VectorType(I32, LANES)
MIDDLE_BITS = 7  # of the codes' zero, 128

# what stays the same from call to call. packed: weights; tail: i32 `[blocks * 64]`, the negative sum of each output's
# codes; stride: bytes of a row of codes; normed: whether an RMSNorm with `eps` stands before the layer; of 4 bits tail:
# scales and middles bfloat16 `[groups, blocks * 64, 2]`; group: inputs of one
LAYER = Struct(
    packed=POINTER, tail=POINTER, scale=POINTER, bias=POINTER,
    outputs=I64, inputs=I64, stride=I64, blocks=I64, normed=I64, eps=FLOAT, group=I64,
)  # fmt: skip


def write_eight(module: ir.Module) -> ir.Function:
    """`function(layer, block, codes, rows, sums)`: codes u8 `[rows, stride]` around 128 -> sums i32 `[rows, 64]`."""
    return tiled(module, "eight_block", {rows: _tile(module, rows) for rows in range(1, TILE + 1)})


def tiled(module: ir.Module, name: str, tiles: dict[int, ir.Function]) -> ir.Function:
    """A product of any number of rows, by those of 1 to TILE: each `tile(layer, block, rows, stride, sums)`."""
    code, made = Code.begin(module, name, VOID, POINTER, I64, POINTER, I64, POINTER)
    layer, block, codes, rows, into = made.args
    stride = LAYER.get(code, layer, "stride")
    with code.count(I64(0), rows, TILE) as row:
        these = code.at(codes, code.mul(row, stride), BYTE)
        there = code.at(into, code.mul(row, I64(OUTPUTS)), I32)
        after = code.append_basic_block()
        fork = code.switch(code.least(code.sub(rows, row), I64(TILE)), after)
        for count, tile in tiles.items():
            case = code.append_basic_block()
            fork.add_case(I64(count), case)
            code.position_at_end(case)
            code.call(tile, [layer, block, these, stride, there])
            code.branch(after)
        code.position_at_end(after)
    code.ret_void()
    return made


def _tile(module: ir.Module, rows: int) -> ir.Function:
    code, made = Code.begin(module, f"eight_tile{rows}", VOID, POINTER, I64, POINTER, I64, POINTER)
    layer, block, codes, stride, into = made.args
    first = code.mul(block, I64(OUTPUTS))
    weights = code.at(LAYER.get(code, layer, "packed"), code.mul(first, stride), BYTE)
    tail = code.at(LAYER.get(code, layer, "tail"), first, I32)
    zeros = [code.shl(code.get(tail, I64(n), NUMBERS, 4), MIDDLE_BITS_EVERYWHERE) for n in range(REGISTERS)]
    sums = [[code.variable(zero) for zero in zeros] for _ in range(rows)]
    lines = [code.at(codes, code.mul(stride, I64(row)), BYTE) for row in range(rows)]
    dot = code.declared("llvm.x86.avx512.vpdpbusd.512", *[NUMBERS] * 4)
    with code.count(I64(0), code.sdiv(stride, I64(TOGETHER))) as place:
        address = code.at(weights, code.mul(place, I64(OUTPUTS * TOGETHER)), BYTE)
        parts = [code.get(address, I64(n), NUMBERS, 64) for n in range(REGISTERS)]
        for line, slots in zip(lines, sums, strict=True):
            four = code.spread(code.get(line, place, I32, 1), LANES)
            for part, slot in zip(parts, slots, strict=True):
                code.store(code.call(dot, [code.load(slot, typ=NUMBERS), four, part]), slot)
    for place, slot in enumerate(slot for slots in sums for slot in slots):
        code.put(code.load(slot, typ=NUMBERS), into, I64(place), 4)
    code.ret_void()
    return made


MIDDLE_BITS_EVERYWHERE = ir.Constant(NUMBERS, [MIDDLE_BITS] * LANES)
