"""What few rows meet between two products, head by head: rotary positions, the paged cache, attention."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llvmlite import ir

from siglane.nn.cpu.jit.code import Code, Module, Struct, everywhere, exp2, in_threads
from siglane.nn.cpu.jit.limits import GROUP, TOGETHER
from siglane.nn.cpu.jit.processor import Processor
from siglane.nn.cpu.jit.types import FLOAT, HALF, I32, I64, LANES, POINTER, VOID

CHUNK = 32  # tokens that are seen together: their keys and values fit into the nearest cache
LINE = ir.VectorType(FLOAT, LANES)  # a register, and what memory gives at a time
HALF_LINE = ir.VectorType(HALF, LANES)  # what becomes one
HALF_MOST = 65504.0  # of the numbers of 16 bits
CACHE_LINE = {FLOAT: 16, HALF: 32}  # values
NUMBERS = ir.VectorType(I32, LANES)
MEANS_REGISTERS = 16  # among which sums of values are spread, so that one need not wait for the one before

# of a step. table i32 `[.., columns]`, rows and lengths i64 `[count]`: as in the engine's `DecodeRows`; scale: of
# products, times log2(e); token: values from one token's keys to the next one's; together: key heads that a thread
# takes at a time, which divide all of them; half: 1 where keys and values are numbers of 16 bits, else 0
STEP = Struct(
    table=POINTER, rows=POINTER, lengths=POINTER,
    columns=I64, count=I64, kv_heads=I64, page_size=I64, token=I64, together=I64, half=I64, scale=FLOAT,
)  # fmt: skip
NORMS = Struct(q=POINTER, k=POINTER, heads=I64, eps=FLOAT)  # gains `[head_dim]` of the first `heads` and of the others
CALL = Struct(step=POINTER, q=POINTER, stride=I64, group=I64, keys=POINTER, values=POINTER, out=POINTER, next=I64)


def heads_module(head_dim: int, processor: Processor) -> Module:
    """Five functions of float32, in this order of arguments.

    attend: step, q, values from row to row of q, query heads of a key head, keys, values, out `[count, heads,
    head_dim]`, threads. store: k, v, values from row to row of each, slots i64 `[rows]`, keys, values, rows, values of
    a token. store_half: the same, keys and values are float16. turn: x, values from row to row, cos, sin, out
    `[rows, heads, head_dim]`, rows, heads. turn_normed: the same and NORMS.
    """
    module = Module("heads", processor)
    _attend(module, _work(module, head_dim, _see(module, head_dim)))
    _store(module, "store", LINE)
    _store(module, "store_half", HALF_LINE)
    _turn(module, head_dim)
    _turn(module, head_dim, normed=True)
    return module


def _attend(module: Module, work: ir.Function) -> None:
    code, made = Code.begin(module, "attend", VOID, POINTER, POINTER, I64, I64, *[POINTER] * 3, I64)
    *given, threads = made.args
    call = code.room(CALL.kind, 1)
    for name, value in zip(CALL.names, (*given, I64(0)), strict=True):
        CALL.put(code, value, call, name)
    in_threads(code, work, call, threads)
    code.ret_void()


def _work(module: Module, head_dim: int, see: ir.Function) -> ir.Function:
    """What each thread does: the query heads of some key heads of one row, until none is left."""
    code, made = Code.begin(module, "work", VOID, POINTER)
    (call,) = made.args
    step = CALL.get(code, call, "step")
    kv_heads, together = (STEP.get(code, step, name) for name in ("kv_heads", "together"))
    group = CALL.get(code, call, "group")
    size, kind, parts = I64(head_dim), ir.VectorType(FLOAT, head_dim), code.sdiv(kv_heads, together)
    peaks, totals = code.room(FLOAT, TOGETHER * GROUP), code.room(FLOAT, TOGETHER * GROUP)
    own = code.mul(together, group)
    with code.taken(CALL.address(code, call, "next"), code.mul(STEP.get(code, step, "count"), parts)) as item:
        row, head = code.sdiv(item, parts), code.mul(code.srem(item, parts), together)
        first = code.mul(code.mul(head, group), size)
        q = code.at(CALL.get(code, call, "q"), code.add(code.mul(row, CALL.get(code, call, "stride")), first), FLOAT)
        width = code.mul(code.mul(kv_heads, group), size)
        out = code.at(CALL.get(code, call, "out"), code.add(code.mul(row, width), first), FLOAT)
        pages_row = code.mul(code.get(STEP.get(code, step, "rows"), row, I64), STEP.get(code, step, "columns"))
        pages = code.at(STEP.get(code, step, "table"), pages_row, I32)
        length = code.get(STEP.get(code, step, "lengths"), row, I64)
        with code.count(I64(0), own) as one:
            code.put(FLOAT(-math.inf), peaks, one)
            code.put(FLOAT(0), totals, one)
            code.put(ir.Constant(kind, [0.0] * head_dim), out, one, 4)
        with code.count(I64(0), length, CHUNK) as start, code.count(I64(0), together) as number:
            before = code.mul(number, group)
            queries, into = (code.at(some, code.mul(before, size), FLOAT) for some in (q, out))
            sums = [code.at(some, before, FLOAT) for some in (peaks, totals)]
            left = code.sub(length, start)
            code.call(see, [call, code.add(head, number), queries, into, *sums, pages, start, left])
        with code.count(I64(0), own) as one:
            share = code.spread(code.fdiv(FLOAT(1), code.get(totals, one, FLOAT)), head_dim)
            code.put(code.fmul(code.get(out, one, kind, 4), share), out, one, 4)
    code.ret_void()
    return made


def _see(module: Module, head_dim: int) -> ir.Function:
    """Adds a CHUNK of tokens from `start` on to what a group of heads has seen: call, head, q, out, peaks, totals,
    pages, start, how many tokens there are from there on. Sums are kept relative to the greatest score so far
    (arXiv:1805.02867)."""
    code, made = Code.begin(module, "see", VOID, POINTER, I64, *[POINTER] * 5, I64, I64)
    call, head, q, out, peaks, totals, pages, start, left = made.args
    step, registers = CALL.get(code, call, "step"), head_dim // LANES
    memory = [CALL.get(code, call, name) for name in ("keys", "values")]
    scores = code.room(FLOAT, CHUNK)
    tokens = _Tokens(code, step, pages, code.mul(head, I64(head_dim)), head_dim)
    seen, (keys, values) = _Seen.of(code, tokens, start, left, memory)
    with code.count(I64(0), CALL.get(code, call, "group")) as own:
        line = code.mul(own, I64(registers))
        queries, into = code.at(q, line, LINE), code.at(out, line, LINE)
        scale = code.spread(STEP.get(code, step, "scale"), LANES)
        query = [code.fmul(code.get(queries, I64(n), LINE, 4), scale) for n in range(registers)]
        before = code.spread(code.get(peaks, own, FLOAT), LANES)
        peak = seen.scores(query, keys, scores, before)
        kept = exp2(code, code.fsub(before, peak))
        means = [code.fmul(code.get(into, I64(n), LINE, 4), kept) for n in range(registers)]
        total, means = seen.means(means, values, scores, peak)
        for n, mean in enumerate(means):
            code.put(mean, into, I64(n), 4)
        earlier = code.fmul(code.get(totals, own, FLOAT), code.extract_element(kept, I32(0)))
        code.put(code.fadd(earlier, code.total(total)), totals, own)
        code.put(code.extract_element(peak, I32(0)), peaks, own)
    code.ret_void()
    return made


@dataclass(frozen=True)
class _Tokens:
    """A sequence's, of one key head, whose values begin with value `first` of a token's."""

    code: Code
    step: ir.Value
    pages: ir.Value
    first: ir.Value
    head_dim: int

    @contextmanager
    def each(self, first: ir.Value, last: ir.Value) -> Iterator[tuple[ir.Value, ir.Value]]:
        """Places of the sequence from `first` on below `last`, and where the values of the token there begin."""
        code, page_size = self.code, STEP.get(self.code, self.step, "page_size")
        page, offset = (code.variable(divide(first, page_size)) for divide in (code.sdiv, code.srem))
        with code.count(first, last) as place:
            own, within = (code.load(slot, typ=I64) for slot in (page, offset))
            slot = code.add(code.mul(code.sext(code.get(self.pages, own, I32), I64), page_size), within)
            yield place, code.add(code.mul(slot, STEP.get(code, self.step, "token")), self.first)
            behind = code.add(within, I64(1))
            ended = code.icmp_signed("==", behind, page_size)
            code.store(code.select(ended, I64(0), behind), offset)
            code.store(code.add(own, code.zext(ended, I64)), page)

    def prefetch(self, first: ir.Value, last: ir.Value, kind: ir.Type, memory: list[ir.Value]) -> None:
        code = self.code
        with self.each(first, last) as (_, begin):
            for values in memory:
                for n in range(0, self.head_dim, CACHE_LINE[kind]):
                    code.prefetch(code.at(values, code.add(begin, I64(n)), kind))

    def widen(self, first: ir.Value, number: ir.Value, memory: list[ir.Value], near: list[ir.Value]) -> None:
        """A token's numbers of 16 bits from value `first` on become float32, the token with that number near."""
        code, registers = self.code, self.head_dim // LANES
        for values, here in zip(memory, near, strict=True):
            line, there = code.at(values, first, HALF), code.mul(number, I64(registers))
            for n in range(registers):
                wide = code.fpext(code.get(line, I64(n), HALF_LINE, 2), LINE)
                code.put(wide, here, code.add(there, I64(n)))


@dataclass(frozen=True)
class _Seen:
    """Up to CHUNK tokens that are seen together, a register's LANES at a time: what is missing are copies of the first,
    of weight 0. places: where each one's values begin, i64; filled: how many with the copies."""

    code: Code
    places: ir.Value
    count: ir.Value
    filled: ir.Value

    @classmethod
    def of(
        cls, code: Code, tokens: _Tokens, start: ir.Value, left: ir.Value, memory: list[ir.Value]
    ) -> tuple[_Seen, list[ir.Value]]:
        """Those from `start` on of `left`, and where float32 keys and values are read from `places` on: in memory, or
        near, where numbers of 16 bits are widened to. The next ones are called from memory, to come while these are
        computed."""
        count, places = code.least(left, I64(CHUNK)), code.room(I64, CHUNK)
        filled = code.and_(code.add(count, I64(LANES - 1)), I64(-LANES))
        near = [code.room(LINE, CHUNK * tokens.head_dim // LANES) for _ in memory]
        soon = code.add(start, code.select(code.icmp_signed("==", start, I64(0)), I64(0), I64(CHUNK)))
        last = code.add(start, code.least(left, I64(2 * CHUNK)))
        half = code.icmp_signed("!=", STEP.get(code, tokens.step, "half"), I64(0))
        with code.if_else(half) as (widened, whole):
            with widened:
                tokens.prefetch(soon, last, HALF, memory)
                with tokens.each(start, code.add(start, count)) as (place, begin):
                    one = code.sub(place, start)
                    tokens.widen(begin, one, memory, near)
                    code.put(code.mul(one, I64(tokens.head_dim)), places, one)
            with whole:
                tokens.prefetch(soon, last, FLOAT, memory)
                with tokens.each(start, code.add(start, count)) as (place, begin):
                    code.put(begin, places, code.sub(place, start))
        with code.count(count, filled) as one:
            code.put(code.load(places, typ=I64), places, one)
        read = [code.select(half, here, there) for here, there in zip(near, memory, strict=True)]
        return cls(code, places, count, filled), read

    def scores(self, query: list[ir.Value], keys: ir.Value, scores: ir.Value, peak: ir.Value) -> ir.Value:
        """Writes the products of a query, in registers, with the keys; the greatest of them and of `peak`."""
        code, most = self.code, self.code.variable(peak)
        with code.count(I64(0), self.filled, LANES) as some:
            score = _lanes_of_sums(code, [_product(code, query, token) for token in self._rows(keys, some)])
            score = code.select(self._real(some), score, everywhere(LINE, -math.inf))
            code.store(score, code.at(scores, some, FLOAT))
            code.store(code.greater(score, code.load(most, typ=LINE)), most)
        values = code.load(most, typ=LINE)
        for width in (LANES >> power for power in range(1, LANES.bit_length())):
            turned = [(lane + width) % LANES for lane in range(LANES)]
            values = code.greater(code.shuffle_vector(values, values, ir.Constant(NUMBERS, turned)), values)
        return values

    def means(
        self, means: list[ir.Value], values: ir.Value, scores: ir.Value, peak: ir.Value
    ) -> tuple[ir.Value, list[ir.Value]]:
        """The sum of weights, in lanes, and `means` with the values times these; writes weights where scores were."""
        code, nothing = self.code, everywhere(LINE, 0.0)
        total, sums = code.variable(nothing), [[code.variable(mean) for mean in means]]
        for _ in range(1, MEANS_REGISTERS // len(means)):
            sums.append([code.variable(nothing) for _ in means])
        with code.count(I64(0), self.filled, LANES) as some:
            weights = exp2(code, code.fsub(code.load(code.at(scores, some, FLOAT), typ=LINE, align=4), peak))
            weights = code.select(self._real(some), weights, nothing)
            code.store(weights, code.at(scores, some, FLOAT))
            code.store(code.fadd(code.load(total, typ=LINE), weights), total)
            for number, token in enumerate(self._rows(values, some)):
                weight = code.spread(code.get(scores, code.add(some, I64(number)), FLOAT), LANES)
                for n, slot in enumerate(sums[number % len(sums)]):
                    value = code.get(token, I64(n), LINE, 4)
                    code.store(code.intrinsic("llvm.fma", LINE, value, weight, code.load(slot, typ=LINE)), slot)
        columns = [[code.load(slot, typ=LINE) for slot in slots] for slots in zip(*sums, strict=True)]
        return code.load(total, typ=LINE), [functools.reduce(code.fadd, column) for column in columns]

    def _rows(self, values: ir.Value, some: ir.Value) -> list[ir.Value]:
        """The addresses of LANES tokens' values from `some` on."""
        code = self.code
        return [code.at(values, code.get(self.places, code.add(some, I64(n)), I64), FLOAT) for n in range(LANES)]

    def _real(self, some: ir.Value) -> ir.Value:
        """Of LANES tokens from `some` on whether they are no copies."""
        left = self.code.trunc(self.code.sub(self.count, some), I32)
        return self.code.icmp_signed("<", ir.Constant(NUMBERS, list(range(LANES))), self.code.spread(left, LANES))


def _product(code: Code, query: list[ir.Value], token: ir.Value) -> ir.Value:
    """A register whose lanes' sum is the product of a query with a token's keys."""
    total = code.fmul(query[0], code.get(token, I64(0), LINE, 4))
    for n, register in enumerate(query[1:], 1):
        total = code.intrinsic("llvm.fma", LINE, register, code.get(token, I64(n), LINE, 4), total)
    return total


def _lanes_of_sums(code: Code, registers: list[ir.Value]) -> ir.Value:
    """The sum of the first of LANES registers in the first lane, that of the second in the second, and so on."""
    width = LANES
    while len(registers) > 1:
        width //= 2
        pair = (*range(width), *range(LANES, LANES + width))
        lanes = [start + lane for start in range(0, LANES, 2 * width) for lane in pair]
        masks = [ir.Constant(NUMBERS, [lane + part for lane in lanes]) for part in (0, width)]
        halves = zip(registers[: len(registers) // 2], registers[len(registers) // 2 :], strict=True)
        registers = [code.fadd(*(code.shuffle_vector(a, b, mask) for mask in masks)) for a, b in halves]
    return registers[0]


def _store(module: Module, name: str, kind: ir.Type) -> None:
    """kind: of a register as it is kept. What 16 bits cannot hold becomes the greatest number they do."""
    code, made = Code.begin(module, name, VOID, POINTER, POINTER, I64, I64, *[POINTER] * 3, I64, I64)
    k, v, k_stride, v_stride, slots, keys, values, rows, width = made.args
    with code.count(I64(0), rows) as row:
        there = code.mul(code.get(slots, row, I64), width)
        for source, stride, into in ((k, k_stride, keys), (v, v_stride, values)):
            line, target = code.at(source, code.mul(row, stride), FLOAT), code.at(into, there, kind.element)
            with code.count(I64(0), code.sdiv(width, I64(LANES))) as place:
                some = code.get(line, place, LINE, 4)
                code.put(some if kind is LINE else _halved(code, some), target, place, 2)
    code.ret_void()


def _halved(code: Code, some: ir.Value) -> ir.Value:
    for sign, beyond in ((1, ">"), (-1, "<")):
        most = everywhere(LINE, sign * HALF_MOST)
        some = code.select(code.fcmp_ordered(beyond, some, most), most, some)
    return code.fptrunc(some, HALF_LINE)


def _turn(module: Module, head_dim: int, *, normed: bool = False) -> None:
    """normed: each head is divided by its root mean square and multiplied with its gains first."""
    arguments = (POINTER, I64, *[POINTER] * 3, I64, I64, *[POINTER] * normed)
    code, made = Code.begin(module, "turn_normed" if normed else "turn", VOID, *arguments)
    x, stride, cos, sin, out, rows, heads, *norms = made.args
    half = ir.VectorType(FLOAT, head_dim // 2)
    with code.count(I64(0), rows) as row:
        line, into = code.at(x, code.mul(row, stride), FLOAT), code.mul(row, heads)
        tables = [
            [code.get(table, code.add(code.mul(row, I64(2)), I64(n)), half, 4) for n in (0, 1)] for table in (cos, sin)
        ]
        with code.count(I64(0), heads) as head:
            first, second = (code.get(line, code.add(code.mul(head, I64(2)), I64(n)), half, 4) for n in (0, 1))
            if normed:
                first, second = _normed(code, norms[0], head, first, second)
            place = code.mul(code.add(into, head), I64(2))
            for number, (own, other) in enumerate(((first, second), (second, first))):
                turned = code.fmul(own, tables[0][number])
                turned = code.intrinsic("llvm.fma", half, other, tables[1][number], turned)
                code.put(turned, out, code.add(place, I64(number)), 4)
    code.ret_void()


def _normed(code: Code, norms: ir.Value, head: ir.Value, *halves: ir.Value) -> list[ir.Value]:
    """The halves of a head behind the norm of q, or of k."""
    kind = halves[0].type
    squares = code.intrinsic("llvm.fma", kind, halves[0], halves[0], code.fmul(halves[1], halves[1]))
    mean = code.fdiv(code.total(squares), FLOAT(2 * kind.count))
    root = code.intrinsic("llvm.sqrt", FLOAT, code.fadd(mean, NORMS.get(code, norms, "eps")))
    share = code.spread(code.fdiv(FLOAT(1), root), kind.count)
    of_q = code.icmp_signed("<", head, NORMS.get(code, norms, "heads"))
    gains = code.select(of_q, NORMS.get(code, norms, "q"), NORMS.get(code, norms, "k"))
    return [
        code.fmul(code.fmul(own, share), code.get(gains, I64(number), kind, 4)) for number, own in enumerate(halves)
    ]
