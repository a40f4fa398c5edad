"""Attention on CPUs where loops can be compiled: one call for all decoding sequences, page by page, without a copy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from siglane.engine.attention.kernels import DecodeAttention, DecodeRows
from siglane.engine.attention.runs import RunKernels
from siglane.engine.cache.kv import PagedKV
from siglane.lm.qwen import QwenModel
from siglane.nn.cpu.jit.entrance import heads
from siglane.nn.cpu.jit.limits import GROUP
from siglane.nn.quantise import has_float_layers

if TYPE_CHECKING:
    from siglane.nn.cpu.jit.calls import Heads, PagedStep


@dataclass(frozen=True, slots=True, eq=False)
class CompiledKernels(RunKernels):
    heads: Heads = field(kw_only=True)

    def store(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.heads.store(slots, k, v, *self.kv.slots[layer])

    def decode(self, rows: DecodeRows) -> DecodeAttention:
        step, slots, attend = self.seen(rows), self.kv.slots, self.heads.attend
        return lambda layer, q: attend(step, q, *slots[layer])

    def seen(self, rows: DecodeRows) -> PagedStep:
        from siglane.nn.cpu.jit.calls import PagedStep

        return PagedStep(*rows[:3], self.kv.keys)


def compiled_kernels(kv: PagedKV, language: QwenModel) -> CompiledKernels | None:
    """None where loops are not compiled for such heads, or not for keys and values as they are kept."""
    kept = torch.float32, torch.float16
    fits = kv.keys.dtype in kept and language.norm.weight.dtype == torch.float32
    compiled = _heads_of(language) if fits else None
    return None if compiled is None else CompiledKernels(kv, heads=compiled)


def kept_dtype(language: QwenModel) -> torch.dtype:
    """Of keys and values where `compiled_kernels` is asked for: as the model computes, or float16 beside weights of
    fewer bits, whose own error is tens of times that of rounding to it. Weights pass by once a step, keys and values
    once for each sequence."""
    dtype = language.norm.weight.dtype
    halves = dtype == torch.float32 and not has_float_layers(language) and _heads_of(language) is not None
    return torch.float16 if halves else dtype


def _heads_of(language: QwenModel) -> Heads | None:
    few = language.heads <= GROUP * language.kv_heads
    return heads(language.config.head_dim) if few else None
