"""Encoder blocks by slices of rows: what one operation writes is still in a cache when the next one reads it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from siglane.nn.attention import Segments
from siglane.nn.encoder import EncoderBlock, EncoderMLP
from siglane.nn.rope import Rotary
from siglane.types import AttentionBackend

CHUNK_ROWS = 1024  # that pass through a block together


def chunk(model: nn.Module) -> None:
    """Turns the encoder blocks of `model` into chunked ones: the same parameters, another forward."""
    for module in model.modules():
        if type(module) is EncoderBlock:
            module.__class__ = ChunkedBlock
        elif type(module) is EncoderMLP:
            chunk_mlp(module, CHUNK_ROWS)


def chunk_mlp(mlp: EncoderMLP, rows: int) -> None:
    mlp.__class__ = ChunkedMLP
    assert isinstance(mlp, ChunkedMLP)
    mlp.chunk_rows = rows


class ChunkedBlock(EncoderBlock):
    """Takes neighbouring segments of at most CHUNK_ROWS rows together, or a longer one alone."""

    def forward(
        self, x: torch.Tensor, segments: Segments, backend: AttentionBackend, rotary: Rotary | None = None
    ) -> torch.Tensor:
        groups = groups_of(segments.lengths) if _pays(x, CHUNK_ROWS) else []
        if len(groups) < 2:
            return self.together(x, segments, backend, rotary)
        sizes = [sum(lengths) for lengths in groups]
        tables = [None] * len(sizes) if rotary is None else list(zip(*(t.split(sizes) for t in rotary), strict=True))
        y = torch.empty_like(x)
        for rows, into, lengths, table in zip(x.split(sizes), y.split(sizes), groups, tables, strict=True):
            into.copy_(self.together(rows, Segments.of(lengths, x.device), backend, table))
        return y

    def together(
        self, x: torch.Tensor, segments: Segments, backend: AttentionBackend, rotary: Rotary | None = None
    ) -> torch.Tensor:
        """The block, of all rows at once."""
        return super().forward(x, segments, backend, rotary)


class ChunkedMLP(EncoderMLP):
    """`chunk_rows` rows at a time: each is seen by itself, so a long segment is divided too."""

    chunk_rows: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not _pays(x, self.chunk_rows):
            return super().forward(x)
        outputs = []
        for rows in x.split(self.chunk_rows):
            outputs.append(super().forward(rows))
        return torch.cat(outputs)


def groups_of(lengths: Sequence[int]) -> list[list[int]]:
    """`lengths` in their order, in groups that add up to at most CHUNK_ROWS or have one member."""
    groups: list[list[int]] = []
    rows = 0
    for length in lengths:
        if not groups or rows + length > CHUNK_ROWS:
            groups.append([])
            rows = 0
        groups[-1].append(length)
        rows += length
    return groups


def _pays(x: torch.Tensor, rows: int) -> bool:
    return x.device.type == "cpu" and len(x) > rows and not torch.is_grad_enabled()
