"""The matrix product behind every linear layer, by the fastest float32 kernel the machine has."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x W^T + b`: x `[..., K]`, weight `[N, K]`, bias `[N]` -> `[..., N]`.

    On CPUs float32 goes to oneDNN, which uses AVX-512 where torch's default (MKL) keeps to AVX2 on processors not made
    by Intel: measured 2.1 times as fast, the sums as exact (docs/structures.md). It has no gradient, so training
    keeps the default.
    """
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()
    if plain and torch.backends.mkldnn.is_available():
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return F.linear(x, weight, bias)
