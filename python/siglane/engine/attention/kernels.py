"""What a step's attention calls, in one small protocol: another set of kernels is another object here.

Rows of a step: `[0:D]` are one token each of D sequences, `[D:T]` several tokens each of others, one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from siglane.engine.batch import Chunk


class DecodeRows(NamedTuple):
    """One token each of B sequences.

    table i32 `[max_running + 1, columns]`: the pages of each sequence, a row each, what is behind them says nothing;
    rows i64 `[B]`: each token's row of the table; lengths i64 `[B]`, 1 at least: tokens it sees, itself the last.
    Padding stands at the end and sees the first token of the scratch page. chunks: the same as the host knows them,
    without padding; empty where a step is recorded, to be repeated with other numbers in these tensors.
    """

    table: torch.Tensor
    rows: torch.Tensor
    lengths: torch.Tensor
    chunks: tuple[Chunk, ...]


class PrefillRows(NamedTuple):
    """Several tokens each of N sequences, which see their own past and each other up to themselves: a causal mask
    aligned to the end of queries and keys.

    table: as in `DecodeRows`; rows i64 `[N]`; cu_seqlens_q, cu_seqlens_k i32 `[N + 1]`: where each one's queries and
    keys begin; chunks: as the host knows them, never empty.
    """

    table: torch.Tensor
    rows: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    chunks: tuple[Chunk, ...]


# (layer, q `[B, heads, head_dim]`) -> `[B, heads, head_dim]`
DecodeAttention = Callable[[int, torch.Tensor], torch.Tensor]
# (layer, q `[T, heads, head_dim]`, k and v `[T, kv_heads, head_dim]`) -> `[T, heads, head_dim]`
PrefillAttention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Kernels(Protocol):
    """Kernels over one paged cache, which they are built with. NaN in pages of others, in the scratch page and behind a
    sequence's end must not get through.

    records: whether `decode` reads nothing but tensors and starts the same operations whatever they hold. Its rows then
    may have no chunks: a step is recorded, on CUDA in a graph, and repeated.
    """

    @property
    def records(self) -> bool: ...

    def store(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Keeps k and v `[T, kv_heads, head_dim]` in `slots` i64 `[T]`. Padding shares slot 0."""
        ...

    def decode(self, rows: DecodeRows) -> DecodeAttention:
        """Called once a step, before the first layer."""
        ...

    def prefill(self, rows: PrefillRows) -> PrefillAttention:
        """Called once a step, before the first layer; the step's keys and values are stored before it attends."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class StepAttention:
    """The `LayerAttention` of one step. decodes: its rows D; decode, prefill: None without such rows. What q, k and v
    have behind `slots` is padding, which is not stored and attends to nothing."""

    kernels: Kernels
    slots: torch.Tensor
    decodes: int
    decode: DecodeAttention | None
    prefill: PrefillAttention | None

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        padding = len(q) - len(self.slots)
        if padding:
            q, k, v = (x[:-padding] for x in (q, k, v))
        self.kernels.store(layer, self.slots, k, v)
        attended = self._attend(layer, q, k, v)
        return F.pad(attended, (0, 0, 0, 0, 0, padding)) if padding else attended

    def _attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.prefill is None:
            assert self.decode is not None
            return self.decode(layer, q)
        if self.decode is None:
            return self.prefill(layer, q, k, v)
        out, first = torch.empty_like(q, memory_format=torch.contiguous_format), self.decodes
        out[:first] = self.decode(layer, q[:first])
        out[first:] = self.prefill(layer, q[first:], k[first:], v[first:])
        return out
