"""Choices that configurations and modules share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["gelu_tanh", "gelu_erf", "quick_gelu", "silu"]

AttentionBackend = Literal["eager", "sdpa", "onednn", "torch_varlen", "flash_attn", "flashinfer"]

BackendChoice = Literal["auto", "eager", "sdpa", "onednn", "torch_varlen", "flash_attn", "flashinfer"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3's longer context. factor: what slow rotary frequencies are divided by; low_turns, high_turns: full turns
    within `original_length` positions up to which a frequency is slow and from which it is fast."""

    factor: float
    low_turns: float
    high_turns: float
    original_length: int
