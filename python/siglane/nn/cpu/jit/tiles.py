"""The same product by AMX, where a processor has it: one instruction multiplies 16 rows of 64 codes with 16 outputs."""

from __future__ import annotations

from llvmlite import ir

from siglane.nn.cpu.int8_packing import INPUTS, OUTPUTS, TOGETHER
from siglane.nn.cpu.jit.code import Code
from siglane.nn.cpu.jit.types import BYTE, I32, I64, LANES, POINTER, VOID

TILE_ROWS = 16  # rows of a tile, and outputs of a tile of weights
LEAST_ROWS = 3  # of fewer rows the registers' instructions take less time
LINE = 64  # bytes of a tile's row, and of a line of memory
TILES, WIDTH = OUTPUTS // TILE_ROWS, OUTPUTS * TOGETHER  # tiles of a block; bytes of four inputs of one
AHEAD = 8192  # bytes between weights that are multiplied and those that are called from memory
ROWS, SUMS = 0, 4  # numbers of tiles: of codes, of the first sums; between them lie two of weights
NUMBERS = ir.VectorType(I32, LANES)
NUMBER = ir.IntType(8)


def write_tiles(module: ir.Module) -> ir.Function:
    """`function(weights, codes, stride, rows, sums, *zeros)`: weights of a block, codes u8 `[rows, stride]`; zeros:
    what sums begin with, a register for every 16 outputs. Codes and sums are read and written up to whole tiles."""
    code, made = Code.begin(module, "tiles", VOID, POINTER, POINTER, I64, I64, POINTER, *[NUMBERS] * TILES)
    weights, codes, stride, rows, into, *zeros = made.args
    load, store = (
        code.declared(f"llvm.x86.{name}64", VOID, NUMBER, POINTER, I64) for name in ("tileloadd", "tilestored")
    )
    multiply = code.declared("llvm.x86.tdpbusd", VOID, *[NUMBER] * 3)
    code.call(code.declared("llvm.x86.ldtilecfg", VOID, POINTER), [_configuration(module)])
    begin = code.room(I32, OUTPUTS)
    for number, zero in enumerate(zeros):
        code.put(zero, begin, I64(number), LINE)
    with code.count(I64(0), rows, TILE_ROWS) as row:
        lines, there = code.at(codes, code.mul(row, stride), BYTE), code.at(into, code.mul(row, I64(OUTPUTS)), I32)
        for number in range(TILES):  # a step of 0 bytes: all rows are the same
            code.call(load, [NUMBER(SUMS + number), code.at(begin, I64(number), NUMBERS), I64(0)])
        with code.count(I64(0), stride, INPUTS) as place:
            address = code.at(weights, code.mul(place, I64(OUTPUTS)), BYTE)
            for line in range(INPUTS * OUTPUTS // LINE):
                code.prefetch(code.at(address, I64(AHEAD + line * LINE), BYTE))
            code.call(load, [NUMBER(ROWS), code.at(lines, place, BYTE), stride])
            for number in range(TILES):
                tile = NUMBER(ROWS + 1 + number % 2)
                code.call(load, [tile, code.at(address, I64(number), NUMBERS), I64(WIDTH)])
                code.call(multiply, [NUMBER(SUMS + number), NUMBER(ROWS), tile])
        for number in range(TILES):
            code.call(store, [NUMBER(SUMS + number), code.at(there, I64(number), NUMBERS), I64(WIDTH)])
    code.call(code.declared("llvm.x86.tilerelease", VOID), [])
    code.ret_void()
    return made


def _configuration(module: ir.Module) -> ir.Value:
    """Eight tiles, as large as there are: palette 1, bytes of each one's rows, and rows."""
    facts = [1, *[0] * 15, *[LINE, 0] * 8, *[0] * 16, *[TILE_ROWS] * 8, *[0] * 8]
    kind = ir.ArrayType(BYTE, len(facts))
    made = ir.GlobalVariable(module, kind, "configuration")
    made.initializer, made.global_constant, made.align = ir.Constant(kind, facts), True, LINE
    return made
