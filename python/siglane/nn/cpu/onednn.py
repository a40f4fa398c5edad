"""oneDNN's products of 8-bit codes, where they are exact."""

from __future__ import annotations

import functools
import platform

import torch

from siglane.nn.cpu.codes import STEPS
from siglane.nn.cpu.few_rows import LEVELS


def integer_product(
    codes: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_points: torch.Tensor,
    zero: int = 0,
    rows_scale: float = 1.0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`(codes - zero) W^T`, times the outputs' `scale` and `rows_scale`, plus `bias`, float32. oneDNN has fast kernels
    for unsigned rows and signed weights only."""
    product: torch.Tensor = torch.ops.onednn.qlinear_pointwise.default(
        codes, rows_scale, zero, packed, scale, zero_points, bias, 1.0, 0, torch.float32, "none", [], ""
    )
    return product


@functools.cache
def is_exact() -> bool:
    """Whether they are integer products here: kernels for processors without VNNI add neighbours up in 16 bits, which
    overflow in silence, and on other architectures there is none that is fast."""
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return False
    inputs = 64
    weight = torch.full((16, inputs), LEVELS, dtype=torch.int8)
    codes = torch.full((16, inputs), STEPS, dtype=torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    product = integer_product(codes, packed, torch.ones(16), torch.zeros(16, dtype=torch.int64))
    return bool((product == inputs * STEPS * LEVELS).all())
