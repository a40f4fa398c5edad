"""Attention on CPUs reads keys and values where they lie: pages one after another are one call, without a copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from siglane.engine.attention.kernels import DecodeAttention, DecodeRows, PrefillAttention, PrefillRows
from siglane.engine.attention.plain import GatheredDecodes, Prefills, TorchKernels
from siglane.engine.batch import Chunk
from siglane.engine.cache.kv import PagedKV

Views = tuple[torch.Tensor, ...]

FEW_RUNS = 4  # of a sequence's pages: for so many a call each costs less than to copy them together


class RunKernels(TorchKernels):
    """A call for each prefill and for each run of a decoding sequence that lies in few; the pages of all others are
    gathered for one call together."""

    def decode(self, rows: DecodeRows) -> DecodeAttention:
        runs = [token_runs(chunk, self.kv.page_size) for chunk in rows.chunks]
        runs += [(PADDING,)] * (len(rows.rows) - len(runs))
        if all(len(one) == 1 for one in runs):
            return WholeDecodes.of(self.kv, [one[0] for one in runs])
        in_place = tuple(InPlace.of(row, one, self.kv) for row, one in enumerate(runs) if len(one) <= FEW_RUNS)
        scattered = [row for row, one in enumerate(runs) if len(one) > FEW_RUNS]
        if not scattered:
            return MixedDecodes(in_place, None, None)
        places = torch.tensor(scattered)
        chunks = tuple(rows.chunks[row] for row in scattered)
        gathered = GatheredDecodes.of(self.kv, DecodeRows(rows.table, rows.rows[places], rows.lengths[places], chunks))
        return MixedDecodes(in_place, places, gathered)

    def prefill(self, rows: PrefillRows) -> PrefillAttention:
        slots = [_slots(token_runs(chunk, self.kv.page_size)) for chunk in rows.chunks]
        return Prefills.of(self.kv, rows, slots)


class Run(NamedTuple):
    """`length` tokens that lie one after another from slot `first` on: they are read where they lie."""

    first: int
    length: int


PADDING = Run(0, 1)


def token_runs(chunk: Chunk, page_size: int) -> tuple[Run, ...]:
    """Up to the chunk's end: a sequence may have pages beyond it, taken for guesses."""
    runs, left = [], chunk.stop
    for first, pages in chunk.sequence.runs():
        length = min(left, pages * page_size)
        if length:
            runs.append(Run(first * page_size, length))
        left -= length
    return tuple(runs)


def _slots(runs: tuple[Run, ...]) -> slice | torch.Tensor:
    stretches = [slice(first, first + length) for first, length in runs]
    if len(stretches) == 1:
        return stretches[0]
    return torch.cat([torch.arange(one.start, one.stop) for one in stretches])


@dataclass(frozen=True, slots=True, eq=False)
class WholeDecodes:
    """Where every row's sequence lies in one run. views: keys and values of every row by layer,
    `[1, kv_heads, length, head_dim]`."""

    kv_heads: int
    views: list[tuple[tuple[torch.Tensor, torch.Tensor], ...]]

    @classmethod
    def of(cls, kv: PagedKV, runs: list[Run]) -> WholeDecodes:
        """All views at once: a step has many calls, and each takes its microseconds."""
        by_row = [zip(*_views(kv, run), strict=True) for run in runs]
        return cls(kv.keys.shape[3], list(zip(*by_row, strict=True)))

    def __call__(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        views = self.views[layer]
        grouped = q.view(len(views), 1, self.kv_heads, -1, q.shape[-1]).unbind()
        attended = [F.scaled_dot_product_attention(x, k, v) for x, (k, v) in zip(grouped, views, strict=True)]
        return (attended[0] if len(views) == 1 else torch.cat(attended)).reshape(q.shape)


@dataclass(frozen=True, slots=True, eq=False)
class InPlace:
    """Row `row`, whose sequence lies in few runs: a prefix that others read too, and its own part. runs: keys and
    values of each, by layer, `[1, kv_heads, length, head_dim]`."""

    row: int
    runs: tuple[tuple[Views, Views], ...]

    @classmethod
    def of(cls, row: int, runs: tuple[Run, ...], kv: PagedKV) -> InPlace:
        return cls(row, tuple(_views(kv, run) for run in runs))

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """q `[heads, head_dim]` -> `[1, kv_heads, heads / kv_heads, head_dim]`. Several runs are joined by the sums of
        their exponentials (arXiv:2112.05682 section 2)."""
        keys, values = self.runs[0]
        grouped = q.view(1, keys[layer].shape[1], -1, q.shape[-1])
        if len(self.runs) == 1:
            return F.scaled_dot_product_attention(grouped, keys[layer], values[layer])
        parts = [_flash(grouped, keys[layer], values[layer]) for keys, values in self.runs]
        shares = torch.stack([logsumexp for _, logsumexp in parts]).softmax(0)
        attended = torch.stack([part for part, _ in parts])
        return (attended * shares[..., None]).sum(0).to(q.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class MixedDecodes:
    """Rows in place, and those of `places` i64 gathered; None without such."""

    in_place: tuple[InPlace, ...]
    places: torch.Tensor | None
    gathered: GatheredDecodes | None

    def __call__(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for one in self.in_place:
            out[one.row] = one.attend(layer, q[one.row]).reshape(q.shape[1:])
        if self.places is not None and self.gathered is not None:
            out[self.places] = self.gathered(layer, q[self.places])
        return out


def _views(kv: PagedKV, run: Run) -> tuple[Views, Views]:
    keys, values = kv.all_by_head
    return keys.narrow(3, *run).unbind(), values.narrow(3, *run).unbind()


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `scaled_dot_product_attention`, with the logarithms of its sums `[1, heads, L]`."""
    attended, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v)
    return attended, logsumexp
