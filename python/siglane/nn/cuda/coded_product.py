"""A product with weights of 8 or 4 bits, which are widened where they are read: a Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

GROUP = 64  # neighbouring weights of 4 bits that have a scale of their own
BLOCK_N, FEW_N = 64, 32  # outputs of a program, fewer where there are few rows, or most of a GPU would wait


def coded_product(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, lows: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """x `[M, K]`, its columns next to each other -> `[M, N]`.

    Without lows: codes i8 `[N, K]`, scales `[N]`. With them: codes u8 `[N, groups * GROUP / 2]`, the first half of a
    group in the lower bits, scales and lows `[N, groups]`; what lies behind K in the last group meets zeros.
    """
    rows, inner = x.shape
    columns = codes.shape[0]
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    block_n = FEW_N if rows <= 64 else BLOCK_N
    sizes = {"K": inner, "BLOCK_M": block_m, "BLOCK_N": block_n, "GROUP": GROUP}
    multiply_codes[(triton.cdiv(columns, block_n), triton.cdiv(rows, block_m))](
        x, codes, scales, scales if lows is None else lows, scales if bias is None else bias, out, rows, columns,
        x.stride(0), FOUR=lows is not None, BIASED=bias is not None, **sizes,
    )  # fmt: skip
    return out


@triton.jit
def multiply_codes(
    x, codes, scales, lows, bias, out, rows, columns, stride,
    FOUR: tl.constexpr, BIASED: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    kind = out.dtype.element_ty
    there, wanted = (row < rows)[:, None], (column < columns)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if FOUR:
        GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
        half = tl.arange(0, GROUP // 2)
        for group in range(GROUPS):
            places = (column * GROUPS + group)[None, :]
            scale = tl.load(scales + places, mask=wanted, other=0.0).to(tl.float32)
            low = tl.load(lows + places, mask=wanted, other=0.0).to(tl.float32)
            pairs = tl.load(codes + places * (GROUP // 2) + half[:, None], mask=wanted, other=0).to(tl.int32)
            first = group * GROUP + half
            second = first + GROUP // 2
            one = tl.load(x + row[:, None] * stride + first[None, :], mask=there & (first < K)[None, :], other=0.0)
            two = tl.load(x + row[:, None] * stride + second[None, :], mask=there & (second < K)[None, :], other=0.0)
            lower = ((pairs & 15).to(tl.float32) * scale + low).to(kind)
            upper = ((pairs >> 4).to(tl.float32) * scale + low).to(kind)
            total += tl.dot(one, lower, input_precision="tf32x3")
            total += tl.dot(two, upper, input_precision="tf32x3")
    else:
        inner = tl.arange(0, GROUP)
        for start in range(0, K, GROUP):
            place = start + inner
            inside = place < K
            part = tl.load(x + row[:, None] * stride + place[None, :], mask=there & inside[None, :], other=0.0)
            weight = tl.load(codes + (column * K)[None, :] + place[:, None], mask=wanted & inside[:, None], other=0)
            total += tl.dot(part, weight.to(kind), input_precision="tf32x3")
        total *= tl.load(scales + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if BIASED:
        total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(out + row[:, None] * columns + column[None, :], total.to(kind), mask=there & wanted)
