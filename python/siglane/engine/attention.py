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


def paged_attention(kv: PagedKV, batch: StepBatch, backend: str) -> LayerAttention:
    """The attention of one step. backend: "torch" or "flashinfer" (`choose_paged_backend`)."""
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
    return "flashinfer" if usable and choice != "torch" else "torch"


class Prefill(NamedTuple):
    """Several tokens of one sequence: rows `first..last` of the step, attending to `length` tokens in `pages`.

    mask: bool `[count, length]`, None when the chunk begins the sequence and plain causality holds.
    """

    first: int
    last: int
    length: int
    pages: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Decodes:
    """One token each of B sequences. rows i64 `[B]`; pages i64 `[B, P]`, short sequences repeat their last page;
    bias `[B, 1, 1, P * page_size]`: 0 for real tokens, -inf after each sequence's end."""

    rows: torch.Tensor
    pages: torch.Tensor
    bias: torch.Tensor


class TorchPagedAttention:
    """Gathers pages and calls scaled-dot-product attention: one call for all decoding sequences, one per prefill."""

    def __init__(self, kv: PagedKV, batch: StepBatch) -> None:
        self.kv = kv
        device = kv.keys.device
        self.slots = torch.tensor(batch.slots(kv.page_size), device=device)
        # a last page is read whole, under a mask: NaN that its previous owner left behind would get through
        half_new = [
            chunk.sequence.block_table[chunk.stop // kv.page_size]
            for chunk in batch.chunks
            if chunk.start <= chunk.stop - chunk.stop % kv.page_size < chunk.stop
        ]
        if half_new:
            kv.keys[:, half_new], kv.values[:, half_new] = 0, 0
        self.prefills: list[Prefill] = []
        decoding: list[tuple[int, Chunk]] = []
        row = 0
        for chunk in batch.chunks:
            if chunk.tokens == 1 and chunk.start > 0:
                decoding.append((row, chunk))
            else:
                self.prefills.append(self._prefill(row, chunk, device))
            row += chunk.tokens
        self.decodes = self._decodes(decoding, device) if decoding else None

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = self.kv.keys[layer], self.kv.values[layer]
        keys.flatten(0, 1).index_copy_(0, self.slots, k)
        values.flatten(0, 1).index_copy_(0, self.slots, v)
        out = torch.empty_like(q)
        for prefill in self.prefills:
            rows = slice(prefill.first, prefill.last)
            if prefill.mask is None:
                ks, vs = k[rows], v[rows]
            else:
                ks = keys[prefill.pages].flatten(0, 1)[: prefill.length]
                vs = values[prefill.pages].flatten(0, 1)[: prefill.length]
            qs, ks, vs = (x.transpose(0, 1)[None] for x in (q[rows], ks, vs))
            causal = prefill.mask is None
            attended = F.scaled_dot_product_attention(
                qs, ks, vs, attn_mask=prefill.mask, is_causal=causal, enable_gqa=True
            )
            out[rows] = attended[0].transpose(0, 1)
        if self.decodes is not None:
            out[self.decodes.rows] = _decode(q[self.decodes.rows], keys, values, self.decodes)
        return out

    def _prefill(self, row: int, chunk: Chunk, device: torch.device) -> Prefill:
        mask = None
        if chunk.start:
            mask = torch.ones(chunk.tokens, chunk.stop, dtype=torch.bool, device=device).tril(chunk.start)
        used = -(-chunk.stop // self.kv.page_size)
        pages = torch.tensor(chunk.sequence.block_table[:used], device=device)
        return Prefill(row, row + chunk.tokens, chunk.stop, pages, mask)

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


def _decode(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, decodes: Decodes) -> torch.Tensor:
    """q `[B, heads, head_dim]`: the query heads of one key head stand in for a query's length; nothing is repeated."""
    ks, vs = (x[decodes.pages].flatten(1, 2).transpose(1, 2) for x in (keys, values))
    qs = q.unflatten(1, (ks.shape[1], -1))
    return F.scaled_dot_product_attention(qs, ks, vs, attn_mask=decodes.bias).flatten(1, 2)
