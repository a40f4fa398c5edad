"""Activations by the names of `types.Activation`."""

from __future__ import annotations

from typing import assert_never

import torch
import torch.nn.functional as F
from torch import nn

from siglane.types import Activation


def activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """tanh- and erf-GELU differ by 5e-4, QuickGELU by 2e-2 (formats.md trap 1): the name decides, never a default."""
    match activation:
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "gelu_erf":
            return F.gelu(x)
        case "quick_gelu":
            return x * torch.sigmoid(1.702 * x)
        case "silu":
            return F.silu(x)
        case _:
            assert_never(activation)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`: `[..., 2 * N]`, gate first -> `[..., N]`. Without gradients `gate_up` is written to."""
    gate, up = gate_up.chunk(2, dim=-1)
    if torch.is_grad_enabled():
        return F.silu(gate) * up
    return F.silu(gate, inplace=True).mul_(up)


class SwiGLU(nn.Module):
    """`swiglu`, where another kernel may stand for it."""

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        return swiglu(gate_up)
