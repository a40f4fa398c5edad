"""What follows attention in a decoder's block."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from siglane.config.language import LanguageConfig
from siglane.nn.act import SwiGLU
from siglane.nn.linear import ColumnParallelLinear, RowParallelLinear
from siglane.nn.parallel import TensorParallel


class BlockMLP(Protocol):
    """An MLP, or a mixture of them (`experts.py`)."""

    def added(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor: ...


class DecoderMLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: LanguageConfig, tp: TensorParallel) -> None:
        super().__init__()
        sections = {"gate": config.intermediate_size, "up": config.intermediate_size}
        self.gate_up = ColumnParallelLinear(config.hidden_size, sections, bias=config.mlp_bias, tp=tp)
        self.swiglu = SwiGLU()
        self.down_proj = RowParallelLinear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias, tp=tp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_up.gated(x, self.swiglu))

    def added(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """`residual + self(x)`"""
        return self.down_proj.added(self.gate_up.gated(x, self.swiglu), residual)
