"""Attention over the paged KV cache: each `LayerAttention` is built for one step and holds all of its metadata."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from siglane.engine.batch import Chunk, StepBatch
from siglane.engine.kv import PagedKV
from siglane.errors import ConfigError
from siglane.lm.attention import LayerAttention
from siglane.nn.attention import eager


def paged_attention(kv: PagedKV, batch: StepBatch, backend: str) -> LayerAttention:
    """The attention of one step. backend: "torch", "eager" or "flashinfer" (`choose_paged_backend`)."""
    if backend == "eager":
        return EagerPagedAttention(kv, batch)
    if backend == "flashinfer":
        from siglane.engine.attention_flashinfer import FlashInferPagedAttention

        return FlashInferPagedAttention(kv, batch)
    return TorchPagedAttention(kv, batch)


def choose_paged_backend(choice: str, device: torch.device, dtype: torch.dtype) -> str:
    """ConfigError when an explicit choice cannot run here."""
    usable = (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and importlib.util.find_spec("flashinfer") is not None
    )
    if choice == "flashinfer" and not usable:
        raise ConfigError(f"paged_backend flashinfer needs the package, CUDA and half precision, not {device} {dtype}")
    if choice == "eager":
        return choice
    return "flashinfer" if usable and choice != "torch" else "torch"


Views = tuple[torch.Tensor, ...]

FEW_RUNS = 4  # of a sequence's pages: for so many a call each costs less than to copy them together


class Prefill(NamedTuple):
    """Several tokens of one sequence: rows `first..last` of the step, attending to the tokens in `slots`.

    slots: a slice where they lie one after another and are read there; mask: bool `[count, length]`, None when the
    chunk begins the sequence and plain causality holds.
    """

    first: int
    last: int
    slots: slice | torch.Tensor
    mask: torch.Tensor | None


class Run(NamedTuple):
    """`length` tokens that lie one after another from slot `first` on: they are read where they lie."""

    first: int
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class InPlace:
    """One token, row `row` of the step, of a sequence that lies in few runs: a prefix that others read too, and its own
    part. runs: keys and values of each, by layer, `[1, kv_heads, length, head_dim]`."""

    row: int
    runs: tuple[tuple[Views, Views], ...]

    @classmethod
    def of(cls, row: int, runs: tuple[Run, ...], kv: PagedKV) -> InPlace:
        """All views at once: a step has many calls, and each takes its microseconds."""
        keys, values = kv.all_by_head
        return cls(row, tuple((keys.narrow(3, *run).unbind(), values.narrow(3, *run).unbind()) for run in runs))


@dataclass(frozen=True, slots=True, eq=False)
class Decodes:
    """One token each of B other sequences. rows i64 `[B]`; pages i64 `[B, P]`, short sequences repeat their last page;
    bias `[B, 1, 1, P * page_size]`: 0 for real tokens, -inf after each sequence's end."""

    rows: torch.Tensor
    pages: torch.Tensor
    bias: torch.Tensor


class TorchPagedAttention:
    """Scaled-dot-product attention over the pages: a call for each prefill and for each run of a decoding sequence that
    lies in few; the pages of all others are gathered for one call together."""

    def __init__(self, kv: PagedKV, batch: StepBatch) -> None:
        self.kv = kv
        device = kv.keys.device
        self.slots = torch.tensor(batch.slots(kv.page_size), device=device)
        self.prefills: list[Prefill] = []
        self.in_place: list[InPlace] = []
        scattered: list[tuple[int, Chunk]] = []
        row = 0
        for chunk in batch.chunks:
            if chunk.tokens > 1 or chunk.start == 0:
                self.prefills.append(self._prefill(row, chunk, device))
            elif device.type == "cpu" and len(runs := _token_runs(chunk, kv.page_size)) <= FEW_RUNS:
                self.in_place.append(InPlace.of(row, runs, kv))  # elsewhere a call costs more
            else:
                scattered.append((row, chunk))
            row += chunk.tokens
        # keys and values of every row by layer, where all rows decode sequences that lie in one run each
        whole = [one.runs[0] for one in self.in_place if len(one.runs) == 1]
        self.whole = list(zip(*(zip(*views, strict=True) for views in whole), strict=True)) if len(whole) == row else []
        self._clear_new_pages(batch)
        self.decodes = self._decodes(scattered, device) if scattered else None

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = self.kv.slots[layer]
        keys.index_copy_(0, self.slots, k)
        values.index_copy_(0, self.slots, v)
        if self.whole:
            return _decode_whole(q, keys.shape[1], self.whole[layer])
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for prefill in self.prefills:
            rows = slice(prefill.first, prefill.last)
            out[rows] = self._attend(layer, prefill, q[rows], k[rows], v[rows])
        for one in self.in_place:
            out[one.row] = _decode_in_place(layer, q[one.row], one).reshape(q.shape[1:])
        if self.decodes is not None:
            out[self.decodes.rows] = _decode(
                q[self.decodes.rows], self.kv.keys[layer], self.kv.values[layer], self.decodes
            )
        return out

    def _attend(self, layer: int, prefill: Prefill, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if prefill.mask is not None:
            k, v = (x[prefill.slots] for x in self.kv.slots[layer])
        qs, ks, vs = (x.transpose(0, 1)[None] for x in (q, k, v))
        causal = prefill.mask is None
        attended = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=prefill.mask, is_causal=causal, enable_gqa=True)
        return attended[0].transpose(0, 1)

    def _clear_new_pages(self, batch: StepBatch) -> None:
        """A last page may be gathered whole, under a mask: NaN that its previous owner left would get through."""
        kv = self.kv
        half_new = [
            chunk.sequence.block_table[chunk.stop // kv.page_size]
            for chunk in batch.chunks
            if chunk.start <= chunk.stop - chunk.stop % kv.page_size < chunk.stop
        ]
        if half_new:
            kv.keys[:, half_new], kv.values[:, half_new] = 0, 0

    def _prefill(self, row: int, chunk: Chunk, device: torch.device) -> Prefill:
        mask = None
        if chunk.start:
            mask = torch.ones(chunk.tokens, chunk.stop, dtype=torch.bool, device=device).tril(chunk.start)
        stretches = [slice(first, first + length) for first, length in _token_runs(chunk, self.kv.page_size)]
        slots: slice | torch.Tensor = stretches[0]
        if len(stretches) > 1:
            slots = torch.cat([torch.arange(one.start, one.stop, device=device) for one in stretches])
        return Prefill(row, row + chunk.tokens, slots, mask)

    def _decodes(self, decoding: list[tuple[int, Chunk]], device: torch.device) -> Decodes:
        page_size = self.kv.page_size
        used = [-(-chunk.stop // page_size) for _, chunk in decoding]
        most = max(used)
        pages = [
            chunk.sequence.block_table[:count] + [chunk.sequence.block_table[count - 1]] * (most - count)
            for (_, chunk), count in zip(decoding, used, strict=True)
        ]
        lengths = torch.tensor([chunk.stop for _, chunk in decoding], device=device)
        beyond = torch.arange(most * page_size, device=device) >= lengths[:, None]
        bias = torch.zeros(beyond.shape, dtype=self.kv.keys.dtype, device=device).masked_fill_(beyond, -torch.inf)
        rows = torch.tensor([row for row, _ in decoding], device=device)
        return Decodes(rows, torch.tensor(pages, device=device), bias[:, None, None])


class EagerPagedAttention:
    """Plain products and a softmax over the tokens of each sequence, copied together, for who debugs numbers."""

    def __init__(self, kv: PagedKV, batch: StepBatch) -> None:
        self.kv, device = kv, kv.keys.device
        self.slots = torch.tensor(batch.slots(kv.page_size), device=device)
        self.chunks: list[tuple[slice, torch.Tensor, torch.Tensor]] = []
        row = 0
        for chunk in batch.chunks:
            stretches = [torch.arange(first, first + length) for first, length in _token_runs(chunk, kv.page_size)]
            seen = torch.ones(chunk.tokens, chunk.stop, dtype=torch.bool, device=device).tril(chunk.start)
            self.chunks.append((slice(row, row + chunk.tokens), torch.cat(stretches).to(device), seen))
            row += chunk.tokens

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = self.kv.slots[layer]
        keys.index_copy_(0, self.slots, k)
        values.index_copy_(0, self.slots, v)
        scale = q.shape[-1] ** -0.5
        attended = [
            eager(q[rows][None], keys[slots][None], values[slots][None], scale=scale, mask=seen)[0]
            for rows, slots, seen in self.chunks
        ]
        return torch.cat(attended)


def _token_runs(chunk: Chunk, page_size: int) -> tuple[Run, ...]:
    """Up to the chunk's end: a sequence may have pages beyond it, taken for guesses."""
    runs, left = [], chunk.stop
    for first, pages in chunk.sequence.runs():
        length = min(left, pages * page_size)
        if length:
            runs.append(Run(first * page_size, length))
        left -= length
    return tuple(runs)


def _decode_whole(q: torch.Tensor, kv_heads: int, views: tuple[tuple[torch.Tensor, torch.Tensor], ...]) -> torch.Tensor:
    """q `[B, heads, head_dim]` of one token each; views: keys and values of each, `[1, kv_heads, length, head_dim]`."""
    grouped = q.view(len(views), 1, kv_heads, -1, q.shape[-1]).unbind()
    attended = [F.scaled_dot_product_attention(x, k, v) for x, (k, v) in zip(grouped, views, strict=True)]
    return (attended[0] if len(views) == 1 else torch.cat(attended)).reshape(q.shape)


def _decode_in_place(layer: int, q: torch.Tensor, one: InPlace) -> torch.Tensor:
    """q `[heads, head_dim]` of one token -> `[1, kv_heads, heads / kv_heads, head_dim]`. Several runs are joined by the
    sums of their exponentials (arXiv:2112.05682 section 2)."""
    keys, values = one.runs[0]
    grouped = q.view(1, keys[layer].shape[1], -1, q.shape[-1])
    if len(one.runs) == 1:
        return F.scaled_dot_product_attention(grouped, keys[layer], values[layer])
    parts = [_flash(grouped, keys[layer], values[layer]) for keys, values in one.runs]
    shares = torch.stack([logsumexp for _, logsumexp in parts]).softmax(0)
    attended = torch.stack([part for part, _ in parts])
    return (attended * shares[..., None]).sum(0).to(q.dtype)


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `scaled_dot_product_attention`, with the logarithms of its sums `[1, heads, L]`."""
    attended, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v)
    return attended, logsumexp


def _decode(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, decodes: Decodes) -> torch.Tensor:
    """q `[B, heads, head_dim]`: the query heads of one key head stand in for a query's length; nothing is repeated."""
    ks, vs = (x[decodes.pages].flatten(1, 2).transpose(1, 2) for x in (keys, values))
    qs = q.unflatten(1, (ks.shape[1], -1))
    return F.scaled_dot_product_attention(qs, ks, vs, attn_mask=decodes.bias).flatten(1, 2)
