"""Attention over the paged KV cache by kernels of a GPU, each chosen by a trial when the engine starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch

from siglane.engine.attention.kernels import DecodeAttention, DecodeRows, Kernels, PrefillAttention, PrefillRows
from siglane.engine.attention.plain import TorchKernels
from siglane.engine.attention.trial import Shape, decoded, prefilled, stored
from siglane.engine.cache.kv import PagedKV
from siglane.nn.cuda.ops import OPS
from siglane.nn.cuda.varlen import Packed, attend_packed
from siglane.nn.trial import first_right


class TritonKernels(TorchKernels):
    """`nn/cuda/paged_decode.py` and a store that writes keys and values at once."""

    def store(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        OPS.store(k, v, *self.kv.slots[layer], slots)

    def decode(self, rows: DecodeRows) -> DecodeAttention:
        table, sequences, lengths, _ = rows

        def attend(layer: int, q: torch.Tensor) -> torch.Tensor:
            attended: torch.Tensor = OPS.paged_decode(
                q, *self.kv.slots[layer], table, sequences, lengths, self.kv.page_size, q.shape[-1] ** -0.5
            )
            return attended

        return attend


@dataclass(frozen=True, slots=True, eq=False)
class VarlenKernels(TorchKernels):
    """torch's packed attention: one call for all prefills. grouped: it takes fewer key heads than query heads."""

    grouped: bool = True

    def prefill(self, rows: PrefillRows) -> PrefillAttention:
        queries = Packed(rows.cu_seqlens_q, max(chunk.tokens for chunk in rows.chunks))
        keys, slots = queries, None
        if any(chunk.start for chunk in rows.chunks):
            keys = Packed(rows.cu_seqlens_k, max(chunk.stop for chunk in rows.chunks))
            slots = packed_slots(rows, self.kv.page_size)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if slots is not None:
                k, v = (x.index_select(0, slots) for x in self.kv.slots[layer])
            if not self.grouped:
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            return attend_packed(q, k, v, queries, keys, scale=q.shape[-1] ** -0.5, causal=True)

        return attend


def packed_slots(rows: PrefillRows, page_size: int) -> torch.Tensor:
    """Where the tokens that each sequence sees lie, one sequence after another, i64; nothing is read on the host."""
    starts, total = rows.cu_seqlens_k, sum(chunk.stop for chunk in rows.chunks)
    numbers = torch.arange(len(rows.rows), device=starts.device)
    sequence = numbers.repeat_interleave(starts.diff(), output_size=total)
    place = torch.arange(total, device=starts.device) - starts[sequence]
    pages = rows.table[rows.rows[sequence], place // page_size].long()
    return pages * page_size + place % page_size


@dataclass(frozen=True, slots=True, eq=False)
class TriedKernels:
    """Each part of what passed its trial."""

    storing: Kernels
    decoding: Kernels
    prefilling: Kernels

    @property
    def records(self) -> bool:
        return isinstance(self.decoding, TritonKernels)

    def store(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.storing.store(layer, slots, k, v)

    def decode(self, rows: DecodeRows) -> DecodeAttention:
        return self.decoding.decode(rows)

    def prefill(self, rows: PrefillRows) -> PrefillAttention:
        return self.prefilling.prefill(rows)


Build = Callable[[PagedKV], Kernels]

STEPS: Mapping[str, Build] = MappingProxyType({"Triton": TritonKernels, "torch": TorchKernels})
PREFILLS: Mapping[str, Build] = MappingProxyType(
    {
        "varlen_attn": VarlenKernels,
        "varlen_attn with repeated keys": partial(VarlenKernels, grouped=False),
        "torch": TorchKernels,
    }
)


def tried_kernels(
    shape: Shape, kv: PagedKV, steps: Mapping[str, Build] = STEPS, prefills: Mapping[str, Build] = PREFILLS
) -> TriedKernels:
    """Over `kv`; of each part the first whose numbers are right in a small cache of its shape. EngineError when none's
    are."""
    _, store = first_right("storing keys and values", steps, *stored(shape))
    _, decode = first_right(f"decoding, {shape}", steps, *decoded(shape))
    _, prefill = first_right(f"prefill, {shape}", prefills, *prefilled(shape))
    return TriedKernels(store(kv), decode(kv), prefill(kv))
