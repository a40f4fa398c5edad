"""A product that is cut alike for any number of rows, so that a row's numbers are the same alone and beside others: a
Triton kernel.

Libraries choose how they cut a product, and with it the order of its sums, by its rows too. Here each tile has the same
size, and sums over the same pieces of K one after another (as in github.com/thinking-machines-lab/batch_invariant_ops).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_M, BLOCK_N, BLOCK_K = 64, 32, 64


def fixed_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x `[M, K]`, its columns next to each other, weight `[N, K]`, contiguous, bias `[N]` -> `[M, N]`."""
    rows, inner = x.shape
    columns = weight.shape[0]
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    sizes = {"K": inner, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K}
    multiply_fixed[(triton.cdiv(columns, BLOCK_N), triton.cdiv(rows, BLOCK_M))](
        x, weight, weight if bias is None else bias, out, rows, columns, x.stride(0), BIASED=bias is not None, **sizes
    )
    return out


# of one row another kernel would be compiled, if it might be made for that number; padding has no stride to speak of
@triton.jit(do_not_specialize=["rows", "stride"])
def multiply_fixed(
    x, weight, bias, out, rows, columns, stride,
    BIASED: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner, there, wanted = tl.arange(0, BLOCK_K), (row < rows)[:, None], (column < columns)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        place = start + inner
        inside = place < K
        part = tl.load(x + row[:, None] * stride + place[None, :], mask=there & inside[None, :], other=0.0)
        other = tl.load(weight + (column * K)[None, :] + place[:, None], mask=wanted & inside[:, None], other=0.0)
        total += tl.dot(part, other, input_precision="tf32x3")
    if BIASED:
        total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(out + row[:, None] * columns + column[None, :], total.to(out.dtype.element_ty), mask=there & wanted)
