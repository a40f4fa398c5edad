"""Attention of one new token each of many sequences over their pages: two Triton kernels.

A sequence is cut into at most PARTS parts, a program for each of them and each key head; a second kernel joins them by
the sums of their exponentials (arXiv:2112.05682 section 2). Where it is cut depends on its own length only, so a row's
numbers are the same alone and beside others.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

PARTS = 32
LEAST = 256  # tokens of a part, before the sequence is so long that they grow
BLOCK = 64  # tokens that a program reads at a time
LEAST_ROWS = 16  # of a product of matrices

# A step's numbers lie one list behind another, so where one begins is not always a multiple of 16 bytes: kernels that
# were compiled for it would be compiled anew in the middle of serving.


def paged_decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    page_size: int,
    scale: float,
) -> torch.Tensor:
    """q `[B, heads, head_dim]`, keys and values of one layer `[slots, kv_heads, head_dim]`, table i32: pages of
    sequences, rows i64 `[B]`: each one's row of the table, lengths i64 `[B]`, 1 at least -> `[B, heads, head_dim]`.

    Nothing behind a sequence's end is looked at.
    """
    batch, heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    parts = torch.empty((batch, heads, PARTS, head_dim), dtype=torch.float32, device=q.device)
    peaks, sums = torch.empty((2, batch, heads, PARTS), dtype=torch.float32, device=q.device)
    out = torch.empty((batch, heads, head_dim), dtype=q.dtype, device=q.device)
    sizes = {"HEAD_DIM": head_dim, "BLOCK_D": max(LEAST_ROWS, triton.next_power_of_2(head_dim))}
    cut = {"PARTS": PARTS, "LEAST": LEAST, "BLOCK": BLOCK}
    group = heads // kv_heads
    grouped = {"GROUP": group, "BLOCK_G": max(LEAST_ROWS, triton.next_power_of_2(group)), "PAGE_SIZE": page_size}
    attend_part[(PARTS, kv_heads, batch)](
        q, keys, values, table, rows, lengths, parts, peaks, sums, scale * math.log2(math.e),
        q.stride(0), table.stride(0), kv_heads, **sizes, **cut, **grouped,
    )  # fmt: skip
    join_parts[(heads, batch)](parts, peaks, sums, lengths, out, heads, **sizes, **cut)
    return out


@triton.jit
def part_size(length, PARTS: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens of each part of a sequence, a multiple of BLOCK."""
    return tl.maximum(LEAST, tl.cdiv(tl.cdiv(length, PARTS), BLOCK) * BLOCK)


@triton.jit(do_not_specialize_on_alignment=["rows", "lengths"])
def attend_part(
    q, keys, values, table, rows, lengths, parts, peaks, sums, scale, q_stride, table_stride, kv_heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """All query heads of one key head over one part -> means, greatest scores and sums of exponentials, base 2."""
    part, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + row)
    size = part_size(length, PARTS, LEAST, BLOCK)
    first = part * size
    if first < length:
        end = tl.minimum(first + size, length)
        members, columns = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
        inside = (members < GROUP)[:, None] & (columns < HEAD_DIM)[None, :]
        heads = kv_head * GROUP + members
        queries = tl.load(q + row * q_stride + heads[:, None] * HEAD_DIM + columns[None, :], mask=inside, other=0.0)
        pages = table + tl.load(rows + row) * table_stride
        peak = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_G], tl.float32)
        mean = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        for start in range(first, end, BLOCK):
            tokens = start + tl.arange(0, BLOCK)
            seen = tokens < end
            page = tl.load(pages + tokens // PAGE_SIZE, mask=seen, other=0).to(tl.int64)
            slots = (page * PAGE_SIZE + tokens % PAGE_SIZE) * kv_heads + kv_head
            places = slots[:, None] * HEAD_DIM + columns[None, :]
            read = seen[:, None] & (columns < HEAD_DIM)[None, :]
            key = tl.load(keys + places, mask=read, other=0.0)
            value = tl.load(values + places, mask=read, other=0.0)
            scores = tl.dot(queries, tl.trans(key), input_precision="tf32x3") * scale
            scores = tl.where(seen[None, :], scores, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, 1))
            weights, shrunk = tl.exp2(scores - higher[:, None]), tl.exp2(peak - higher)
            total = total * shrunk + tl.sum(weights, 1)
            mean = mean * shrunk[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="tf32x3")
            peak = higher
        places = (row * kv_heads * GROUP + heads) * PARTS + part
        tl.store(peaks + places, peak, mask=members < GROUP)
        tl.store(sums + places, total, mask=members < GROUP)
        tl.store(parts + places[:, None] * HEAD_DIM + columns[None, :], mean, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["lengths"])
def join_parts(
    parts, peaks, sums, lengths, out, heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + row)
    part, columns = tl.arange(0, PARTS), tl.arange(0, BLOCK_D)
    taken = part * part_size(length, PARTS, LEAST, BLOCK) < length
    place = row * heads + head
    peak = tl.load(peaks + place * PARTS + part, mask=taken, other=float("-inf"))
    shares = tl.exp2(peak - tl.max(peak, 0))
    total = tl.sum(shares * tl.load(sums + place * PARTS + part, mask=taken, other=0.0), 0)
    places = (place * PARTS + part)[:, None] * HEAD_DIM + columns[None, :]
    means = tl.load(parts + places, mask=taken[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
    joined = tl.sum(shares[:, None] * means, 0) / total
    tl.store(out + place * HEAD_DIM + columns, joined.to(out.dtype.element_ty), mask=columns < HEAD_DIM)
