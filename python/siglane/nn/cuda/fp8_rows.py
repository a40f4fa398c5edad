"""Rows in 8-bit floats, each with a scale of its own, for products of hardware: a Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LARGEST = tl.constexpr(448.0)  # of float8_e4m3fn
LEAST = tl.constexpr(1e-12)  # the greatest of a row of zeros


def fp8_rows(x: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`rows_in_torch` of `fp8.py`: x `[M, K]`, its columns next to each other."""
    count, size = x.shape
    codes = torch.empty((count, width), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((count, 1), dtype=torch.float32, device=x.device)
    code_row[(count,)](x, codes, scales, x.stride(0), size, width, BLOCK=triton.next_power_of_2(width))
    return codes, scales


@triton.jit
def code_row(x, codes, scales, stride, size, width, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    values = tl.load(x + row * stride + columns, mask=columns < size, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(values), 0), LEAST), LARGEST)
    spoilt = tl.max((values != values).to(tl.int32), 0) > 0  # a maximum passes over NaN
    tl.store(scales + row, tl.where(spoilt, float("nan"), scale))
    tl.store(codes + row * width + columns, tl.div_rn(values, scale).to(tl.float8e4nv), mask=columns < width)
