"""Attention on CPUs where loops can be compiled: one call for all decoding sequences, page by page, without a copy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from siglane.engine.attention.kernels import DecodeAttention, DecodeRows
from siglane.engine.attention.runs import RunKernels
from siglane.engine.cache.kv import PagedKV
from siglane.nn.cpu.jit.entrance import heads
from siglane.nn.cpu.jit.limits import GROUP

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

        _, _, page_size, kv_heads, size = self.kv.keys.shape
        return PagedStep(*rows[:3], page_size, kv_heads, size)


def compiled_kernels(kv: PagedKV, query_heads: int) -> CompiledKernels | None:
    """None where keys are not float32, too many query heads share one or `entrance.heads` has nothing for them."""
    kv_heads, head_dim = kv.keys.shape[-2:]
    fits = kv.keys.dtype == torch.float32 and query_heads <= GROUP * kv_heads
    compiled = heads(head_dim) if fits else None
    return None if compiled is None else CompiledKernels(kv, heads=compiled)
