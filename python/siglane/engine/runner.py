"""Runs the model: images to features, a step's tokens to logits. Knows pages and rows, nothing of queues."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from siglane.engine.attention import paged_attention
from siglane.engine.batch import StepBatch
from siglane.engine.kv import PagedKV
from siglane.families.model import VisionLanguageModel
from siglane.families.splice import ImageRows, splice
from siglane.types import ImagePatches


class Runner:
    def __init__(self, model: VisionLanguageModel, kv: PagedKV, paged_backend: str, *, packing: bool = True) -> None:
        self.model, self.kv, self.paged_backend, self.packing = model, kv, paged_backend, packing
        self.device, self.dtype = kv.keys.device, kv.keys.dtype
        self.vocab_size = model.language.config.vocab_size

    def encode(self, images: Sequence[ImagePatches]) -> tuple[torch.Tensor, ...]:
        """All images in one packed forward, or each in its own -> each image's rows `[layout.rows, hidden_size]`, in
        the basis of the language model's blocks."""
        groups = [images] if self.packing else [[image] for image in images]
        found = (rows.to(self.dtype) for group in groups for rows in self.model.see(group).split())
        return tuple(self.model.language.turned(rows) for rows in found)

    def forward(self, batch: StepBatch) -> torch.Tensor:
        """Computes the batch, writes its keys and values, and returns logits `[B, vocab_size]`, one row for every
        token that its chunks choose, in order. Running the same batch again gives the same."""
        language = self.model.language
        ids = [i for chunk in batch.chunks for i in chunk.token_ids]
        places = [position for chunk in batch.chunks for position in range(chunk.start, chunk.stop)]
        embeds = language.embed_turned(torch.tensor(ids, device=self.device))
        spans: list[ImageRows] = []
        rows: list[torch.Tensor] = []
        offset = 0
        choosing_rows: list[int] = []
        for chunk in batch.chunks:
            for span in chunk.spans:
                spans.append(span.moved(offset))
                rows.append(chunk.rows(span.image))
            offset += chunk.tokens
            if chunk.samples:
                choosing_rows += range(offset - 1 - len(chunk.guesses), offset)
        embeds = splice(embeds, spans, rows)
        attention = paged_attention(self.kv, batch, self.paged_backend)
        hidden = language.decode(embeds, torch.tensor(places, device=self.device), attention)
        if len(choosing_rows) == len(hidden):
            return language.logits(hidden)
        return language.logits(hidden[torch.tensor(choosing_rows, dtype=torch.long, device=self.device)])
