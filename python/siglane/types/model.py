"""Names of choices that configurations and modules share."""

from __future__ import annotations

from typing import Literal

Activation = Literal["gelu_tanh", "gelu_erf", "quick_gelu", "silu"]

AttentionBackend = Literal["sdpa", "onednn", "torch_varlen", "flash_attn", "flashinfer"]

BackendChoice = Literal["auto", "sdpa", "onednn", "torch_varlen", "flash_attn", "flashinfer"]
