"""Paged attention on CUDA through flashinfer: decoding and prefilling sequences in one ragged call per layer."""

from __future__ import annotations

import flashinfer
import torch

from siglane.engine.batch import StepBatch
from siglane.engine.kv import PagedKV
from siglane.nn.attention import cu_seqlens_of

WORKSPACE_BYTES = 128 << 20


class FlashInferPagedAttention:
    """A `LayerAttention` over `[pages, page_size, kv_heads, head_dim]` (flashinfer's NHD layout).

    flashinfer aligns causal masks to the end of each sequence, which is what a chunk behind a cached prefix needs.
    """

    def __init__(self, kv: PagedKV, batch: StepBatch) -> None:
        self.kv = kv
        self.device = kv.keys.device
        self.slots = torch.tensor(batch.slots(kv.page_size), device=self.device)
        used = [-(-chunk.stop // kv.page_size) for chunk in batch.chunks]
        self.pages = [
            page for chunk, count in zip(batch.chunks, used, strict=True) for page in chunk.sequence.block_table[:count]
        ]
        self.query_lengths = cu_seqlens_of([chunk.tokens for chunk in batch.chunks], self.device)
        self.page_counts = cu_seqlens_of(used, self.device)
        self.last_page = torch.tensor(
            [(chunk.stop - 1) % kv.page_size + 1 for chunk in batch.chunks], dtype=torch.int32, device=self.device
        )
        self.wrapper: flashinfer.BatchPrefillWithPagedKVCacheWrapper | None = None

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = self.kv.keys[layer], self.kv.values[layer]
        keys.flatten(0, 1).index_copy_(0, self.slots, k)
        values.flatten(0, 1).index_copy_(0, self.slots, v)
        if self.wrapper is None:
            self.wrapper = self._plan(q, k)
        out: torch.Tensor = self.wrapper.run(q, (keys, values))
        return out

    def _plan(self, q: torch.Tensor, k: torch.Tensor) -> flashinfer.BatchPrefillWithPagedKVCacheWrapper:
        """Head counts are only known from the first layer's tensors; the plan serves all layers of the step."""
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=self.device)
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(
            self.query_lengths,
            self.page_counts,
            torch.tensor(self.pages, dtype=torch.int32, device=self.device),
            self.last_page,
            q.shape[1],
            k.shape[1],
            q.shape[2],
            self.kv.page_size,
            causal=True,
            q_data_type=q.dtype,
            kv_data_type=self.kv.keys.dtype,
        )
        return wrapper
