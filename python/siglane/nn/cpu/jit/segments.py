"""Attention of packed segments in bfloat16: a thread takes a head of a segment, brings its keys and values into the
order of the products once, and lets some queries after another meet them.

Scores and sums are float32, and relative to the greatest score so far (arXiv:1805.02867). Two products of two numbers
each are one instruction, so rows of a left side are read in pairs, and a right side lies in pairs: of each pair of its
rows the numbers of one column side by side, then the next column's.
"""

from __future__ import annotations

from llvmlite import ir

from siglane.nn.cpu.jit.bfloat16 import SUMS, WORD, add_pairs, rounded
from siglane.nn.cpu.jit.code import EXP2, Code, Module, Struct, call_one, everywhere, exp2, in_threads
from siglane.nn.cpu.jit.processor import Processor
from siglane.nn.cpu.jit.types import BYTE, FLOAT, I32, I64, LANES, POINTER, VOID

KEYS = 1024  # that are brought into order together: with their values they stay in a core's cache
QUERIES = 1024  # of one thread's part
ROWS = 30  # of queries whose scores are computed before they are used: whole tiles of both products
PANEL = 4  # registers of keys that a tile of scores has
MOST_SUMS = 5  # registers of values that a tile of sums has
PART = 128  # keys whose values stay in the nearest cache until all ROWS have met them
REGISTERS = 30  # for a tile's sums and one row of its right side
NUMBERS = ir.VectorType(I32, LANES)
NEAR = EXP2[:5]  # 2^x within 4e-5 of it, of which bfloat16 sees a hundredth
NOTHING = -1e30  # a score of no weight, of which finite numbers can be taken off

# q, k, v: bfloat16 `[N, heads, head_dim]`, their values from row to row; y: the same without gaps; starts: i64
# `[segments + 1]`; parts: how many parts each segment's queries have; room: ROOM bytes for each thread; next, entered:
# items and threads so far; scale: of scores, times log2(e)
CALL = Struct(
    q=POINTER, k=POINTER, v=POINTER, y=POINTER, starts=POINTER, room=POINTER,
    q_row=I64, k_row=I64, v_row=I64, heads=I64, items=I64, parts=I64, next=I64, entered=I64, scale=FLOAT,
)  # fmt: skip


def filled(head_dim: int) -> int:
    """Values of a head up to whole registers."""
    return -(-head_dim // LANES) * LANES


def room(head_dim: int) -> dict[str, int]:
    """Where a thread's parts of its room begin; the last is its size. keys, values: in the order of products; scores,
    whose place the weights take; sums: of values; peaks and totals of queries."""
    width = filled(head_dim)
    sizes = {
        "keys": KEYS * head_dim * 2, "values": KEYS * width * 2, "scores": ROWS * KEYS * 4,
        "sums": QUERIES * width * 4, "peaks": QUERIES * 4, "totals": QUERIES * 4,
    }  # fmt: skip
    places, end = {}, 0
    for name, size in sizes.items():
        places[name], end = end, end + -(-size // 64) * 64
    return {**places, "end": end}


def segments_module(head_dim: int, processor: Processor) -> Module:
    """attend: (call, threads), for heads of `head_dim` values, a multiple of 8."""
    module = Module("segments", processor)
    code, work = Code.begin(module, "work", VOID, POINTER)
    (call,) = work.args
    places = room(head_dim)
    thread = code.atomic_rmw("add", CALL.address(code, call, "entered"), I64(1), "monotonic")
    own = code.at(CALL.get(code, call, "room"), code.mul(thread, I64(places["end"])), BYTE)
    item = _item(module, head_dim)
    with code.taken(CALL.address(code, call, "next"), CALL.get(code, call, "items")) as number:
        code.call(item, [call, own, number])
    code.ret_void()
    code, made = Code.begin(module, "attend", VOID, POINTER, I64)
    in_threads(code, work, *made.args)
    code.ret_void()
    return module


def _spots(code: Code, own: ir.Value, head_dim: int) -> dict[str, ir.Value]:
    """Addresses of the parts of a thread's room."""
    return {name: code.at(own, I64(place), BYTE) for name, place in room(head_dim).items()}


def _item(module: Module, head_dim: int) -> ir.Function:
    """A head of some queries of a segment: call, the thread's room, the item's number."""
    code, made = Code.begin(module, "item", VOID, *[POINTER] * 2, I64)
    call, own, number = made.args
    heads, parts = (CALL.get(code, call, name) for name in ("heads", "parts"))
    head, rest = code.srem(number, heads), code.sdiv(number, heads)
    segment, part = code.sdiv(rest, parts), code.srem(rest, parts)
    begin, end = (code.get(CALL.get(code, call, "starts"), code.add(segment, I64(more)), I64) for more in (0, 1))
    first, step = code.add(begin, code.mul(part, I64(QUERIES))), code.mul(heads, I64(head_dim))
    rows, start = code.least(code.sub(end, first), I64(QUERIES)), code.mul(head, I64(head_dim))

    def line(name: str, row: ir.Value) -> ir.Value:
        above = code.mul(row, CALL.get(code, call, f"{name}_row"))
        return code.at(CALL.get(code, call, name), code.add(above, start), WORD)

    pack_keys, pack_values, see = (write(module, head_dim) for write in (_pack_keys, _pack_values, _see))
    spot = _spots(code, own, head_dim)
    code.call(_reset(module, head_dim), [own, rows])
    with code.if_then(code.icmp_signed(">", rows, I64(0))), code.count(begin, end, KEYS) as key:
        count = code.least(code.sub(end, key), I64(KEYS))
        code.call(pack_keys, [line("k", key), CALL.get(code, call, "k_row"), count, spot["keys"]])
        code.call(pack_values, [line("v", key), CALL.get(code, call, "v_row"), count, spot["values"]])
        with code.count(I64(0), rows, ROWS) as row:
            these = code.least(code.sub(rows, row), I64(ROWS))
            code.call(see, [call, own, line("q", code.add(first, row)), row, these, count])
    into = code.at(CALL.get(code, call, "y"), code.add(code.mul(first, step), start), WORD)
    code.call(_finish(module, head_dim), [own, rows, into, step])
    code.ret_void()
    return made


def _reset(module: Module, head_dim: int) -> ir.Function:
    """Queries that have met no key: room, how many."""
    code, made = Code.begin(module, "reset", VOID, POINTER, I64)
    own, rows = made.args
    spot = _spots(code, own, head_dim)
    with code.count(I64(0), rows) as row:
        code.put(FLOAT(NOTHING), spot["peaks"], row)
        code.put(FLOAT(0), spot["totals"], row)
    with code.count(I64(0), code.mul(rows, I64(filled(head_dim) // LANES))) as register:
        code.put(everywhere(SUMS, 0.0), spot["sums"], register)
    code.ret_void()
    return made


def _pack_keys(module: Module, head_dim: int) -> ir.Function:
    """keys, values from row to row, how many, into: panels of PANEL registers, in each of a head's pairs one number a
    key. What is missing is zero."""
    code, made = Code.begin(module, "pack_keys", VOID, POINTER, I64, I64, POINTER)
    keys, row, count, into = made.args
    width, pairs = PANEL * LANES, head_dim // 2
    with code.count(I64(0), count, width) as first:
        panel = code.at(into, code.mul(first, I64(pairs)), I32)
        here = code.least(code.sub(count, first), I64(width))
        missing = code.icmp_signed("<", here, I64(width))
        with code.if_then(missing), code.count(I64(0), I64(pairs * PANEL)) as register:
            code.put(everywhere(NUMBERS, 0), panel, register)
        with code.count(I64(0), here) as key:
            line = code.at(keys, code.mul(code.add(first, key), row), WORD)
            with code.count(I64(0), I64(pairs)) as pair:
                value = code.get(line, pair, I32, 2)
                code.put(value, panel, code.add(code.mul(pair, I64(width)), key))
    code.ret_void()
    return made


def _pack_values(module: Module, head_dim: int) -> ir.Function:
    """values, values from row to row, how many, into: of each pair of keys one number a value of a head, up to whole
    registers of values and of keys."""
    code, made = Code.begin(module, "pack_values", VOID, POINTER, I64, I64, POINTER)
    values, row, count, into = made.args
    width = filled(head_dim)
    lanes = [min(LANES, head_dim - first) for first in range(0, head_dim, LANES)]
    keys = code.shl(code.lshr(code.add(count, I64(LANES - 1)), I64(4)), I64(4))

    def halves(key: ir.Value, register: int) -> ir.Value:
        """Of one key, zero where there is none."""
        kind = ir.VectorType(WORD, lanes[register])
        there = code.icmp_signed("<", key, count)
        line = code.at(values, code.mul(code.select(there, key, I64(0)), row), WORD)
        some = code.load(code.at(line, I64(register * LANES), WORD), typ=kind, align=2)
        some = code.select(there, some, everywhere(kind, 0))
        if lanes[register] < LANES:
            places = [min(lane, lanes[register]) for lane in range(LANES)]
            some = code.shuffle_vector(some, everywhere(kind, 0), ir.Constant(NUMBERS, places))
        return code.zext(some, NUMBERS)

    with code.count(I64(0), code.lshr(keys, I64(1))) as pair:
        key = code.shl(pair, I64(1))
        for register in range(len(lanes)):
            low, high = halves(key, register), halves(code.add(key, I64(1)), register)
            both = code.or_(low, code.shl(high, everywhere(NUMBERS, 16)))
            code.put(both, into, code.add(code.mul(pair, I64(width // LANES)), I64(register)), 64)
    code.ret_void()
    return made


def _see(module: Module, head_dim: int) -> ir.Function:
    """Some queries meet the keys that are in order: call, room, queries, the first one's number, how many, keys."""
    code, made = Code.begin(module, "see", VOID, *[POINTER] * 3, *[I64] * 3)
    call, own, queries, first, rows, count = made.args
    width, spot = filled(head_dim), _spots(code, own, head_dim)
    sums = code.at(spot["sums"], code.mul(first, I64(width)), FLOAT)
    score, q_row = I64(KEYS * 4), code.mul(CALL.get(code, call, "q_row"), I64(2))
    panel, pairs = PANEL * LANES, head_dim // 2
    products = _Products(module, "scores", PANEL, REGISTERS // (PANEL + 1), add=False)
    with code.count(I64(0), count, panel) as key:
        right = code.at(spot["keys"], code.mul(key, I64(pairs)), I32)
        products(
            code, rows, queries, q_row, right, I64(panel * 4), I64(pairs), code.at(spot["scores"], key, FLOAT), score
        )
    soften = _soften(module, width)
    with code.count(I64(0), rows) as row:
        here = code.add(first, row)
        line = code.at(spot["scores"], code.mul(row, score), BYTE)
        own_sums = code.at(sums, code.mul(row, I64(width)), FLOAT)
        peak, total = (code.at(spot[name], here, FLOAT) for name in ("peaks", "totals"))
        code.call(soften, [line, count, CALL.get(code, call, "scale"), peak, total, own_sums])
    with code.count(I64(0), count, PART) as key:
        some = code.least(code.sub(count, key), I64(PART))
        halves = code.shl(code.lshr(code.add(some, I64(LANES - 1)), I64(4)), I64(3))
        left = code.at(spot["scores"], key, WORD)
        for begin in range(0, width // LANES, MOST_SUMS):
            registers = min(MOST_SUMS, width // LANES - begin)
            weighed = _Products(module, f"sums{registers}", registers, REGISTERS // (registers + 1), add=True)
            right = code.at(code.at(spot["values"], code.mul(key, I64(width // 2)), I32), I64(begin), NUMBERS)
            into = code.at(sums, I64(begin * LANES), FLOAT)
            weighed(code, rows, left, score, right, I64(width * 4), halves, into, I64(width * 4))
    code.ret_void()
    return made


class _Products:
    """Rows of pairs times `registers` registers of columns: functions of up to `tile` rows. add: to what is there."""

    def __init__(self, module: Module, name: str, registers: int, tile: int, *, add: bool) -> None:
        self.tile = tile
        self.functions = {rows: self._function(module, name, rows, registers, add) for rows in range(1, tile + 1)}

    def __call__(
        self, code: Code, rows: ir.Value, left: ir.Value, step: ir.Value, right: ir.Value, right_step: ir.Value,
        pairs: ir.Value, into: ir.Value, into_step: ir.Value,
    ) -> None:  # fmt: skip
        """Steps are bytes from row to row, on the right from pair to pair."""
        with code.count(I64(0), rows, self.tile) as row:
            these, there = code.at(left, code.mul(row, step), BYTE), code.at(into, code.mul(row, into_step), BYTE)
            arguments = [these, step, right, right_step, pairs, there, into_step]
            call_one(code, self.functions, code.sub(rows, row), arguments)

    @staticmethod
    def _function(module: Module, name: str, rows: int, registers: int, add: bool) -> ir.Function:
        name = f"{name}_{rows}"
        if name in module.globals:
            return module.globals[name]
        code, made = Code.begin(module, name, VOID, POINTER, I64, POINTER, I64, I64, POINTER, I64)
        left, step, right, right_step, pairs, into, into_step = made.args
        lines = [code.at(left, code.mul(step, I64(row)), BYTE) for row in range(rows)]
        places = [code.at(into, code.mul(into_step, I64(row)), BYTE) for row in range(rows)]
        sums = [
            [
                code.variable(code.get(place, I64(n), SUMS, 4) if add else everywhere(SUMS, 0.0))
                for n in range(registers)
            ]
            for place in places
        ]
        with code.count(I64(0), pairs) as pair:
            address = code.at(right, code.mul(pair, right_step), BYTE)
            columns = [code.get(address, I64(n), NUMBERS, 64) for n in range(registers)]
            for line, slots in zip(lines, sums, strict=True):
                both = code.spread(code.get(line, pair, I32, 2), LANES)
                for column, slot in zip(columns, slots, strict=True):
                    code.store(add_pairs(code, code.load(slot, typ=SUMS), column, both), slot)
        for place, slots in zip(places, sums, strict=True):
            for n, slot in enumerate(slots):
                code.put(code.load(slot, typ=SUMS), place, I64(n), 4)
        code.ret_void()
        return made


def _soften(module: Module, width: int) -> ir.Function:
    """Scores of a query become weights bfloat16 in their place, up to whole registers: scores, how many, scale, and its
    peak, total and sums so far, which are written to."""
    code, made = Code.begin(module, "soften", VOID, POINTER, I64, FLOAT, *[POINTER] * 3)
    scores, count, scale, peak, total, sums = made.args
    registers = code.lshr(code.add(count, I64(LANES - 1)), I64(4))
    with code.count(count, code.shl(registers, I64(4))) as place:
        code.put(FLOAT(NOTHING), scores, place)
    before = code.load(peak, typ=FLOAT)
    most = code.variable(everywhere(SUMS, NOTHING))
    with code.count(I64(0), registers) as n:
        code.store(code.greater(code.get(scores, n, SUMS, 4), code.load(most, typ=SUMS)), most)
    reduce = code.declared("llvm.vector.reduce.fmax.v16f32", FLOAT, SUMS)
    top = code.greater(before, code.fmul(code.call(reduce, [code.load(most, typ=SUMS)]), scale))
    code.store(top, peak)
    factor, away = code.spread(scale, LANES), code.spread(code.fneg(top), LANES)
    added = code.variable(everywhere(SUMS, 0.0))
    with code.count(I64(0), registers) as n:
        weight = exp2(code, code.intrinsic("llvm.fma", SUMS, code.get(scores, n, SUMS, 4), factor, away), NEAR)
        code.store(code.fadd(code.load(added, typ=SUMS), weight), added)
        code.put(rounded(code, weight), scores, n, 2)
    kept = exp2(code, code.spread(code.fsub(before, top), LANES))
    for n in range(width // LANES):
        code.put(code.fmul(code.get(sums, I64(n), SUMS, 4), kept), sums, I64(n), 4)
    earlier = code.fmul(code.load(total, typ=FLOAT), code.extract_element(kept, I32(0)))
    code.store(code.fadd(earlier, code.total(code.load(added, typ=SUMS))), total)
    code.ret_void()
    return made


def _finish(module: Module, head_dim: int) -> ir.Function:
    """Means of values: room, rows, into, values from row to row."""
    code, made = Code.begin(module, "finish", VOID, POINTER, I64, POINTER, I64)
    own, rows, into, step = made.args
    width, spot = filled(head_dim), _spots(code, own, head_dim)
    totals, sums = spot["totals"], spot["sums"]
    with code.count(I64(0), rows) as row:
        share = code.spread(code.fdiv(FLOAT(1), code.get(totals, row, FLOAT)), LANES)
        line = code.at(into, code.mul(row, step), WORD)
        for n, first in enumerate(range(0, head_dim, LANES)):
            register = code.add(code.mul(row, I64(width // LANES)), I64(n))
            found = rounded(code, code.fmul(code.get(sums, register, SUMS, 4), share))
            if (left := head_dim - first) < LANES:
                found = code.shuffle_vector(found, found, ir.Constant(ir.VectorType(I32, left), list(range(left))))
            code.store(found, code.at(line, I64(first), WORD), align=2)
    code.ret_void()
    return made
