"""Attention of every token by itself: its numbers are the same in a prompt's chunk of any size and alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from siglane.engine.attention.cuda import Build, TritonKernels
from siglane.engine.attention.kernels import DecodeAttention, DecodeRows, Kernels, PrefillAttention, PrefillRows
from siglane.engine.cache.kv import PagedKV

ROWS = 128  # of a prefill at a time: a kernel's scratch memory grows with them


@dataclass(frozen=True, slots=True, eq=False)
class RowKernels:
    """A prefill is as many decoding tokens, each of which sees what stands before it. decoding: reads nothing but
    tensors."""

    decoding: Kernels

    @property
    def records(self) -> bool:
        return self.decoding.records

    def store(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.decoding.store(layer, slots, k, v)

    def decode(self, rows: DecodeRows) -> DecodeAttention:
        return self.decoding.decode(rows)

    def prefill(self, rows: PrefillRows) -> PrefillAttention:
        every = each_token(rows)
        some = [
            DecodeRows(rows.table, own, lengths, ())
            for own, lengths in zip(every.rows.split(ROWS), every.lengths.split(ROWS), strict=True)
        ]
        attends = [self.decode(one) for one in some]

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return torch.cat([one(layer, own) for one, own in zip(attends, q.split(ROWS), strict=True)])

        return attend


def each_token(rows: PrefillRows) -> DecodeRows:
    """Of all sequences; nothing is read on the host."""
    total = sum(chunk.tokens for chunk in rows.chunks)
    counts, device = rows.cu_seqlens_q.diff(), rows.table.device
    sequence = torch.arange(len(rows.rows), device=device).repeat_interleave(counts, output_size=total)
    ends = (rows.cu_seqlens_k.diff() - rows.cu_seqlens_q[1:])[sequence]  # of a sequence, less where its rows end
    lengths = torch.arange(1, total + 1, device=device) + ends
    return DecodeRows(rows.table, rows.rows[sequence], lengths, ())


def _by_rows(kv: PagedKV) -> Kernels:
    return RowKernels(TritonKernels(kv))


# as of `tried_kernels`: what does not depend on other rows, and nothing else
STEPS_ALIKE: Mapping[str, Build] = MappingProxyType({"Triton": TritonKernels})
PREFILLS_ALIKE: Mapping[str, Build] = MappingProxyType({"Triton, each token by itself": _by_rows})
