"""What few rows meet between two products, head by head: rotary positions, the paged cache, attention."""

from __future__ import annotations

import math

from llvmlite import ir

from siglane.nn.cpu.jit.code import FLOAT, I32, I64, POINTER, VOID, Code, Struct, exp2, in_threads
from siglane.nn.cpu.jit.limits import GROUP

CHUNK = 32  # tokens that are seen together: their keys and values fit into the nearest cache
LINE = 16  # numbers that memory gives at a time

# of a step. table i32 `[.., columns]`, rows and lengths i64 `[count]`: as in the engine's `DecodeRows`; scale: of
# products, times log2(e); token: values from one token's keys to the next one's
STEP = Struct(
    table=POINTER, rows=POINTER, lengths=POINTER,
    columns=I64, count=I64, kv_heads=I64, page_size=I64, token=I64, scale=FLOAT,
)  # fmt: skip
CALL = Struct(step=POINTER, q=POINTER, stride=I64, group=I64, keys=POINTER, values=POINTER, out=POINTER, next=I64)


def heads_module(head_dim: int) -> ir.Module:
    """Three functions of float32, in this order of arguments.

    attend: step, q, values from row to row of q, query heads of a key head, keys, values, out `[count, heads,
    head_dim]`, threads. store: k, v, values from row to row of each, slots i64 `[rows]`, keys, values, rows, values of
    a token. turn: x, values from row to row, cos, sin, out `[rows, heads, head_dim]`, rows, heads.
    """
    module = ir.Module("heads")
    _attend(module, _work(module, head_dim, _see(module, ir.VectorType(FLOAT, head_dim))))
    _store(module)
    _turn(module, head_dim)
    return module


def _attend(module: ir.Module, work: ir.Function) -> None:
    code, made = Code.begin(module, "attend", VOID, POINTER, POINTER, I64, I64, *[POINTER] * 3, I64)
    *given, threads = made.args
    call = code.room(CALL.kind, 1)
    for name, value in zip(CALL.names, (*given, I64(0)), strict=True):
        CALL.put(code, value, call, name)
    in_threads(code, work, call, threads)
    code.ret_void()


def _work(module: ir.Module, head_dim: int, see: ir.Function) -> ir.Function:
    """What each thread does: the query heads of one key head of one row, until none is left."""
    code, made = Code.begin(module, "work", VOID, POINTER)
    (call,) = made.args
    step = CALL.get(code, call, "step")
    kv_heads, group = STEP.get(code, step, "kv_heads"), CALL.get(code, call, "group")
    size, kind = I64(head_dim), ir.VectorType(FLOAT, head_dim)
    with code.taken(CALL.address(code, call, "next"), code.mul(STEP.get(code, step, "count"), kv_heads)) as item:
        row, head = code.sdiv(item, kv_heads), code.srem(item, kv_heads)
        first = code.mul(code.mul(head, group), size)
        q = code.at(CALL.get(code, call, "q"), code.add(code.mul(row, CALL.get(code, call, "stride")), first), FLOAT)
        width = code.mul(code.mul(kv_heads, group), size)
        out = code.at(CALL.get(code, call, "out"), code.add(code.mul(row, width), first), FLOAT)
        pages_row = code.mul(code.get(STEP.get(code, step, "rows"), row, I64), STEP.get(code, step, "columns"))
        pages = code.at(STEP.get(code, step, "table"), pages_row, I32)
        length = code.get(STEP.get(code, step, "lengths"), row, I64)
        peaks, totals = code.room(FLOAT, GROUP), code.room(FLOAT, GROUP)
        with code.count(I64(0), group) as own:
            code.put(FLOAT(-math.inf), peaks, own)
            code.put(FLOAT(0), totals, own)
            code.put(ir.Constant(kind, [0.0] * head_dim), out, own, 4)
        with code.count(I64(0), length, CHUNK) as start:
            left = code.least(code.sub(length, start), I64(CHUNK))
            code.call(see, [call, head, q, out, peaks, totals, pages, start, left])
        with code.count(I64(0), group) as own:
            share = code.spread(code.fdiv(FLOAT(1), code.get(totals, own, FLOAT)), head_dim)
            code.put(code.fmul(code.get(out, own, kind, 4), share), out, own, 4)
    code.ret_void()
    return made


def _see(module: ir.Module, kind: ir.VectorType) -> ir.Function:
    """Adds `count` tokens from `start` on to what a group of heads has seen: call, head, q, out, peaks, totals, pages,
    start, count. Sums are kept relative to the greatest score so far (arXiv:1805.02867)."""
    code, made = Code.begin(module, "see", VOID, POINTER, I64, *[POINTER] * 5, I64, I64)
    call, head, q, out, peaks, totals, pages, start, count = made.args
    step = CALL.get(code, call, "step")
    keys, values = (CALL.get(code, call, name) for name in ("keys", "values"))
    page_size, token = STEP.get(code, step, "page_size"), STEP.get(code, step, "token")
    places, scores = code.room(I64, CHUNK), code.room(FLOAT, CHUNK)
    with code.count(I64(0), count) as one:
        place = code.add(start, one)
        page = code.sext(code.get(pages, code.sdiv(place, page_size), I32), I64)
        slot = code.add(code.mul(page, page_size), code.srem(place, page_size))
        first = code.add(code.mul(slot, token), code.mul(head, I64(kind.count)))
        code.put(first, places, one)
        for values_of in (keys, values):  # all at once, so that their ways from memory overlap
            for line in range(0, kind.count, LINE):
                code.prefetch(code.at(values_of, code.add(first, I64(line)), FLOAT))
    with code.count(I64(0), CALL.get(code, call, "group")) as own:
        query = code.fmul(code.get(q, own, kind, 4), code.spread(STEP.get(code, step, "scale"), kind.count))
        before = code.get(peaks, own, FLOAT)
        peak = code.variable(before)
        with code.count(I64(0), count) as one:
            key = code.load(code.at(keys, code.get(places, one, I64), FLOAT), typ=kind, align=4)
            score = code.total(code.fmul(query, key))
            code.put(score, scores, one)
            now = code.load(peak, typ=FLOAT)
            code.store(code.select(code.fcmp_unordered(">", score, now), score, now), peak)
        most = code.load(peak, typ=FLOAT)
        kept = exp2(code, code.fsub(before, most))
        total = code.variable(code.fmul(code.get(totals, own, FLOAT), kept))
        with code.count(I64(0), count) as one:
            weight = exp2(code, code.fsub(code.get(scores, one, FLOAT), most))
            code.put(weight, scores, one)
            code.store(code.fadd(code.load(total, typ=FLOAT), weight, flags=("reassoc",)), total)
        mean = code.variable(code.fmul(code.get(out, own, kind, 4), code.spread(kept, kind.count)))
        with code.count(I64(0), count) as one:
            value = code.load(code.at(values, code.get(places, one, I64), FLOAT), typ=kind, align=4)
            weight = code.spread(code.get(scores, one, FLOAT), kind.count)
            code.store(code.intrinsic("llvm.fma", kind, value, weight, code.load(mean, typ=kind)), mean)
        code.put(code.load(mean, typ=kind), out, own, 4)
        code.put(code.load(total, typ=FLOAT), totals, own)
        code.put(most, peaks, own)
    code.ret_void()
    return made


def _store(module: ir.Module) -> None:
    code, made = Code.begin(module, "store", VOID, POINTER, POINTER, I64, I64, *[POINTER] * 3, I64, I64)
    k, v, k_stride, v_stride, slots, keys, values, rows, width = made.args
    with code.count(I64(0), rows) as row:
        there = code.mul(code.get(slots, row, I64), width)
        for source, stride, into in ((k, k_stride, keys), (v, v_stride, values)):
            line, target = code.at(source, code.mul(row, stride), FLOAT), code.at(into, there, FLOAT)
            with code.count(I64(0), width) as place:
                code.put(code.get(line, place, FLOAT), target, place)
    code.ret_void()


def _turn(module: ir.Module, head_dim: int) -> None:
    code, made = Code.begin(module, "turn", VOID, POINTER, I64, *[POINTER] * 3, I64, I64)
    x, stride, cos, sin, out, rows, heads = made.args
    half = ir.VectorType(FLOAT, head_dim // 2)
    with code.count(I64(0), rows) as row:
        line, into = code.at(x, code.mul(row, stride), FLOAT), code.mul(row, heads)
        tables = [
            [code.get(table, code.add(code.mul(row, I64(2)), I64(n)), half, 4) for n in (0, 1)] for table in (cos, sin)
        ]
        with code.count(I64(0), heads) as head:
            first, second = (code.get(line, code.add(code.mul(head, I64(2)), I64(n)), half, 4) for n in (0, 1))
            place = code.mul(code.add(into, head), I64(2))
            for number, (own, other) in enumerate(((first, second), (second, first))):
                turned = code.fmul(own, tables[0][number])
                turned = code.intrinsic("llvm.fma", half, other, tables[1][number], turned)
                code.put(turned, out, code.add(place, I64(number)), 4)
    code.ret_void()
