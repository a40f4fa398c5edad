"""Sparse MLPs: Triton kernels that start the same programs whatever a router chooses, so that nothing is read on the
host and a step that decodes can be captured.

Of few tokens a program takes one expert and finds those that chose it by itself; an expert that nobody chose ends at
once. Of many, tokens are sorted by expert, and a program takes a piece of one expert's, or ends because there are fewer
pieces than there could be.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS = 16  # of a product of matrices, the fewest
MANY_ROWS = 64  # the same where tokens are sorted
BLOCK_N, BLOCK_K = 64, 64


def route(logits: torch.Tensor, top: int, normalised: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """logits `[T, experts]` -> weights in their dtype and numbers i64 of the `top` likeliest, both `[T, top]`: of a
    softmax in float32, normalised over the chosen ones where that is asked; of equals the first."""
    tokens, experts = logits.shape
    weights = torch.empty((tokens, top), dtype=logits.dtype, device=logits.device)
    chosen = torch.empty((tokens, top), dtype=torch.int64, device=logits.device)
    sizes = {"BLOCK": triton.next_power_of_2(experts), "SLOTS": triton.next_power_of_2(top)}
    route_token[(tokens,)](logits, weights, chosen, experts, TOP=top, NORMALISED=normalised, **sizes)
    return weights, chosen


def expert_products(
    x: torch.Tensor, weight: torch.Tensor, chosen: torch.Tensor, experts: int, scales: torch.Tensor | None = None
) -> torch.Tensor:
    """Each row times the matrix of its expert: weight `[experts * N, K]`, chosen i64 `[T, top]`, x `[T, K]`, a row for
    each token, or `[T * top, K]` -> `[T * top, N]`, multiplied with scales `[T, top]` where they are given."""
    pairs, columns, inner = chosen.numel(), weight.shape[0] // experts, weight.shape[1]
    out = torch.empty((pairs, columns), dtype=x.dtype, device=x.device)
    expert_product[(triton.cdiv(columns, BLOCK_N), experts)](
        x, weight, chosen, chosen if scales is None else scales, out, pairs, columns,
        K=inner, SHARED=pairs // x.shape[0], SCALED=scales is not None, PAIRS=triton.next_power_of_2(pairs),
        ROWS=ROWS, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
    )  # fmt: skip
    return out


def sorted_products(
    x: torch.Tensor, weight: torch.Tensor, chosen: torch.Tensor, experts: int, scales: torch.Tensor | None = None
) -> torch.Tensor:
    """`expert_products` of many tokens."""
    pairs, columns, inner = chosen.numel(), weight.shape[0] // experts, weight.shape[1]
    numbers, order = chosen.flatten().sort(stable=True)
    starts = torch.searchsorted(numbers, torch.arange(experts + 1, device=x.device))
    out = torch.empty((pairs, columns), dtype=x.dtype, device=x.device)
    pieces = triton.cdiv(pairs, MANY_ROWS) + experts - 1  # at most: each expert's last one may be a part
    sorted_product[(triton.cdiv(columns, BLOCK_N), pieces)](
        x, weight, order, starts, starts if scales is None else scales, out, columns,
        K=inner, SHARED=pairs // x.shape[0], SCALED=scales is not None, COUNT=experts,
        EXPERTS=triton.next_power_of_2(experts), ROWS=MANY_ROWS, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
    )  # fmt: skip
    return out


@triton.jit
def route_token(
    logits, weights, chosen, experts, TOP: tl.constexpr, NORMALISED: tl.constexpr, BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    token, numbers, slots = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK), tl.arange(0, SLOTS)
    kind = weights.dtype.element_ty
    scores = tl.load(logits + token * experts + numbers, mask=numbers < experts, other=float("-inf")).to(tl.float32)
    powers = tl.exp(scores - tl.max(scores, 0))
    rest = powers / tl.sum(powers, 0)
    rest = tl.where(numbers < experts, rest, -1.0)
    found, names = tl.zeros([SLOTS], tl.float32), tl.zeros([SLOTS], tl.int32)
    for slot in tl.static_range(TOP):
        name = tl.argmax(rest, 0)
        found = tl.where(slots == slot, tl.max(rest, 0), found)
        names = tl.where(slots == slot, name, names)
        rest = tl.where(numbers == name, -1.0, rest)
    if NORMALISED:
        found = found / tl.sum(found, 0)
    tl.store(weights + token * TOP + slots, found.to(kind), mask=slots < TOP)
    tl.store(chosen + token * TOP + slots, names.to(tl.int64), mask=slots < TOP)


@triton.jit(do_not_specialize=["pairs"])  # each number of rows has another
def expert_product(
    x, weight, chosen, scales, out, pairs, columns,
    K: tl.constexpr, SHARED: tl.constexpr, SCALED: tl.constexpr, PAIRS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """SHARED: pairs of token and expert that have one row of x."""
    expert, every = tl.program_id(1).to(tl.int64), tl.arange(0, PAIRS)
    mine = (tl.load(chosen + every, mask=every < pairs, other=-1) == expert).to(tl.int32)
    count, rank = tl.sum(mine, 0), tl.cumsum(mine, 0)
    for first in range(0, count, ROWS):
        wanted = first + 1 + tl.arange(0, ROWS)
        hits = (rank[None, :] == wanted[:, None]) & (mine[None, :] == 1)
        pair = tl.sum(tl.where(hits, every[None, :], 0), 1).to(tl.int64)
        multiply_pairs(
            x, weight, scales, out, pair, wanted <= count, expert, columns, K, SHARED, SCALED, ROWS, BLOCK_N, BLOCK_K
        )


@triton.jit
def sorted_product(
    x, weight, order, starts, scales, out, columns,
    K: tl.constexpr, SHARED: tl.constexpr, SCALED: tl.constexpr, COUNT: tl.constexpr, EXPERTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """order: pairs, expert after expert; starts `[COUNT + 1]`: where each expert's begin in it."""
    piece, every = tl.program_id(1), tl.arange(0, EXPERTS)
    first = tl.load(starts + every, mask=every < COUNT, other=0)
    last = tl.load(starts + every + 1, mask=every < COUNT, other=0)
    pieces = tl.cdiv(last - first, ROWS)
    before = tl.cumsum(pieces, 0) - pieces
    mine = (before <= piece) & (piece < before + pieces)
    if tl.sum(mine.to(tl.int32), 0) > 0:
        expert = tl.sum(tl.where(mine, every, 0), 0).to(tl.int64)
        places = tl.sum(tl.where(mine, first + (piece - before) * ROWS, 0), 0) + tl.arange(0, ROWS)
        there = places < tl.sum(tl.where(mine, last, 0), 0)
        pair = tl.load(order + places, mask=there, other=0)
        multiply_pairs(x, weight, scales, out, pair, there, expert, columns, K, SHARED, SCALED, ROWS, BLOCK_N, BLOCK_K)


@triton.jit
def multiply_pairs(
    x, weight, scales, out, pair, there, expert, columns,
    K: tl.constexpr, SHARED: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Some pairs of one expert, as many as are there."""
    kind = out.dtype.element_ty
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        inside = inner < K
        sources = x + (pair // SHARED)[:, None] * K + inner[None, :]
        rows = tl.load(sources, mask=there[:, None] & inside[None, :], other=0.0)
        places = (expert * columns + column)[None, :] * K + inner[:, None]
        part = tl.load(weight + places, mask=(column < columns)[None, :] & inside[:, None], other=0.0)
        total += tl.dot(rows, part, input_precision="tf32x3")
    result = total.to(kind)
    if SCALED:
        shares = tl.load(scales + pair, mask=there, other=0.0).to(tl.float32)
        result = (result.to(tl.float32) * shares[:, None]).to(kind)
    targets = out + pair[:, None] * columns + column[None, :]
    tl.store(targets, result, mask=there[:, None] & (column < columns)[None, :])
