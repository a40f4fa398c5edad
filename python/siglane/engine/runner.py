"""Runs the model: images to features, a step's tokens to logits. Knows pages and rows, nothing of queues."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from siglane.engine.attention import paged_attention
from siglane.engine.batch import Chunk, StepBatch
from siglane.engine.kv import PagedKV
from siglane.engine.sampler import likeliest
from siglane.families.model import VisionLanguageModel
from siglane.families.splice import ImageRows, splice
from siglane.types import ImagePatches, Read, Readout

READ_ROWS = 64  # whose logits are held at one time: those of a whole chunk would take hundreds of megabytes


class Computed(NamedTuple):
    """What a forward gives. logits `[B, vocab_size]`: a row for every token that its chunks choose, in order; readouts:
    of each chunk."""

    logits: torch.Tensor
    readouts: list[tuple[Readout, ...]]


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

    def forward(self, batch: StepBatch) -> Computed:
        """Computes the batch and writes its keys and values. Running the same batch again gives the same."""
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
        readouts = self._read(hidden, batch.chunks)
        if len(choosing_rows) == len(hidden):
            return Computed(language.logits(hidden), readouts)
        chosen = hidden[torch.tensor(choosing_rows, dtype=torch.long, device=self.device)]
        return Computed(language.logits(chosen), readouts)

    def _read(self, hidden: torch.Tensor, chunks: Sequence[Chunk]) -> list[tuple[Readout, ...]]:
        """hidden `[T, hidden_size]`, of all chunks."""
        if not any(chunk.sequence.open_reads for chunk in chunks):
            return [()] * len(chunks)
        wanted: list[tuple[int, Read]] = []
        row = 0
        for chunk in chunks:
            wanted += [(row + read.position - chunk.start, read) for read in chunk.wanted]
            row += chunk.tokens
        some = (wanted[first : first + READ_ROWS] for first in range(0, len(wanted), READ_ROWS))
        found = itertools.chain.from_iterable(self._readouts(hidden, one) for one in some)
        return [tuple(itertools.islice(found, len(chunk.wanted))) for chunk in chunks]

    def _readouts(self, hidden: torch.Tensor, wanted: Sequence[tuple[int, Read]]) -> list[Readout]:
        """wanted: rows of `hidden`, and what to tell of each."""
        rows = torch.tensor([row for row, _ in wanted], device=self.device)
        logprobs = self.model.language.logits(hidden[rows]).float().cpu().log_softmax(-1)
        return [_readout(row, read) for row, (_, read) in zip(logprobs, wanted, strict=True)]


def _readout(logprobs: torch.Tensor, read: Read) -> Readout:
    """logprobs float32 `[vocab_size]`."""
    asked = tuple(logprobs[list(read.token_ids)].tolist())
    if not read.top:
        return Readout(read.position, asked)
    top = likeliest(logprobs, read.top)
    pairs = zip(top.token_ids[: read.top].tolist(), top.scores[: read.top].tolist(), strict=True)
    return Readout(read.position, asked, tuple(pairs))
