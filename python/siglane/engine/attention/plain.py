"""Attention over the paged KV cache in torch's own operations: `Kernels` for every device, and for debugging."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from siglane.engine.attention.kernels import DecodeAttention, DecodeRows, PrefillAttention, PrefillRows
from siglane.engine.cache.kv import PagedKV
from siglane.nn.attention import eager


@dataclass(frozen=True, slots=True, eq=False)
class TorchKernels:
    """Scaled-dot-product attention: the pages of all decoding sequences gathered for one call, a call for each prefill.

    records: with it a step gathers whole rows of the table.
    """

    kv: PagedKV
    records: bool = False

    def store(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        keys, values = self.kv.slots[layer]
        keys.index_copy_(0, slots, k)
        values.index_copy_(0, slots, v)

    def decode(self, rows: DecodeRows) -> DecodeAttention:
        return GatheredDecodes.of(self.kv, rows)

    def prefill(self, rows: PrefillRows) -> PrefillAttention:
        table, page_size = rows.table, self.kv.page_size
        slots = [slots_of(table[chunk.sequence.table_row], chunk.stop, page_size) for chunk in rows.chunks]
        return Prefills.of(self.kv, rows, slots)


class EagerKernels(TorchKernels):
    """Plain products and a softmax over the tokens of each sequence, copied together."""

    def decode(self, rows: DecodeRows) -> DecodeAttention:
        attend = self._attend(rows, [1] * len(rows.chunks))
        return lambda layer, q: attend(layer, q)

    def prefill(self, rows: PrefillRows) -> PrefillAttention:
        attend = self._attend(rows, [chunk.tokens for chunk in rows.chunks])
        return lambda layer, q, k, v: attend(layer, q)

    def _attend(self, rows: DecodeRows | PrefillRows, tokens: list[int]) -> Callable[[int, torch.Tensor], torch.Tensor]:
        slots = [slots_of(rows.table[one.sequence.table_row], one.stop, self.kv.page_size) for one in rows.chunks]
        seen = [_seen(count, one.stop, rows.table.device) for count, one in zip(tokens, rows.chunks, strict=True)]

        def attend(layer: int, q: torch.Tensor) -> torch.Tensor:
            keys, values = self.kv.slots[layer]
            scale = q.shape[-1] ** -0.5
            attended = [
                eager(own[None], keys[places][None], values[places][None], scale=scale, mask=mask)[0]
                for own, places, mask in zip(q.split(tokens), slots, seen, strict=True)
            ]
            return torch.cat(attended)

        return attend


@dataclass(frozen=True, slots=True, eq=False)
class GatheredDecodes:
    """pages i64 `[B, P]`, short sequences go on with pages of others; beyond bool `[B, P * page_size, 1, 1]`: what lies
    behind a sequence's end; bias `[B, 1, 1, P * page_size]`: -inf there, else 0."""

    kv: PagedKV
    pages: torch.Tensor
    beyond: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def of(cls, kv: PagedKV, rows: DecodeRows) -> GatheredDecodes:
        most = max((-(-chunk.stop // kv.page_size) for chunk in rows.chunks), default=rows.table.shape[1])
        pages = rows.table.index_select(0, rows.rows)[:, :most].long()
        beyond = torch.arange(most * kv.page_size, device=pages.device) >= rows.lengths[:, None]
        bias = torch.zeros(beyond.shape, dtype=kv.keys.dtype, device=pages.device).masked_fill_(beyond, -torch.inf)
        return cls(kv, pages, beyond[..., None, None], bias[:, None, None])

    def __call__(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """The query heads of one key head stand in for a query's length; nothing is repeated. Keys and values behind
        the end are both cleared: they may be NaN, which gets through a mask."""
        ks, vs = (
            x[layer][self.pages].flatten(1, 2).masked_fill_(self.beyond, 0).transpose(1, 2)
            for x in (self.kv.keys, self.kv.values)
        )
        qs = q.unflatten(1, (ks.shape[1], -1))
        return F.scaled_dot_product_attention(qs, ks, vs, attn_mask=self.bias).flatten(1, 2)


class Prefill(NamedTuple):
    """Several tokens of one sequence: rows `first..last`, attending to the tokens in `slots`.

    slots: a slice where they lie one after another and are read there; mask: bool `[count, length]`, None when the
    chunk begins the sequence and plain causality holds.
    """

    first: int
    last: int
    slots: slice | torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Prefills:
    """A call for each."""

    kv: PagedKV
    parts: tuple[Prefill, ...]

    @classmethod
    def of(cls, kv: PagedKV, rows: PrefillRows, slots: Sequence[slice | torch.Tensor]) -> Prefills:
        parts, first = [], 0
        for chunk, places in zip(rows.chunks, slots, strict=True):
            mask = _seen(chunk.tokens, chunk.stop, rows.table.device) if chunk.start else None
            parts.append(Prefill(first, first + chunk.tokens, places, mask))
            first += chunk.tokens
        return cls(kv, tuple(parts))

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        attended = []
        for first, last, slots, mask in self.parts:
            if mask is None:
                seen = [_kept(x[first:last], self.kv.keys.dtype) for x in (k, v)]
            else:
                seen = [past[slots] for past in self.kv.slots[layer]]
            qs, ks, vs = (x.to(q.dtype).transpose(0, 1)[None] for x in (q[first:last], *seen))
            rows = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
            attended.append(rows[0].transpose(0, 1))
        return attended[0] if len(attended) == 1 else torch.cat(attended)


def slots_of(pages: torch.Tensor, length: int, page_size: int) -> torch.Tensor:
    """Where the first `length` tokens of a sequence lie, i64. pages i32 `[columns]`: its row of the table."""
    used = pages[: -(-length // page_size)].long()
    offsets = torch.arange(page_size, device=pages.device)
    return (used[:, None] * page_size + offsets).flatten()[:length]


def _kept(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values as the cache keeps them, which is what later tokens see."""
    if x.dtype == dtype:
        return x
    most = torch.finfo(dtype).max
    return x.clamp(-most, most).to(dtype)


def _seen(tokens: int, length: int, device: torch.device) -> torch.Tensor:
    """Which of `length` tokens each of the last `tokens` sees, bool `[tokens, length]`."""
    return torch.ones(tokens, length, dtype=torch.bool, device=device).tril(length - tokens)
