"""Sparse MLPs of few tokens: Triton kernels that start the same programs whatever a router chooses, so that a step that
decodes can be captured.

A program takes one expert and finds the tokens that chose it by itself; an expert that nobody chose ends at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS = 16  # of a product of matrices, the fewest
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


@triton.jit
def expert_product(
    x, weight, chosen, scales, out, pairs, columns,
    K: tl.constexpr, SHARED: tl.constexpr, SCALED: tl.constexpr, PAIRS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """SHARED: pairs of token and expert that have one row of x."""
    expert, every = tl.program_id(1).to(tl.int64), tl.arange(0, PAIRS)
    kind = out.dtype.element_ty
    mine = (tl.load(chosen + every, mask=every < pairs, other=-1) == expert).to(tl.int32)
    count, rank = tl.sum(mine, 0), tl.cumsum(mine, 0)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    for first in range(0, count, ROWS):
        wanted = first + 1 + tl.arange(0, ROWS)
        hits = (rank[None, :] == wanted[:, None]) & (mine[None, :] == 1)
        pair = tl.sum(tl.where(hits, every[None, :], 0), 1).to(tl.int64)
        there = wanted <= count
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
