"""Ovis' visual vocabulary: each merged patch becomes a mixture of learned rows (arXiv:2405.20797; formats.md 3.4).

The head gives logits over a vocabulary of tens of thousands of visual words; the row the language model reads is the
expectation of the table under their softmax. The table's last rows are indicators, which no patch can reach.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from siglane.config.projector import LinearLayer, NormLayer, ProjectorConfig
from siglane.nn.linear import ColumnParallelLinear
from siglane.nn.parallel import TensorParallel
from siglane.projector.downsample import merged_rows
from siglane.types import Grid

CHUNK_ROWS = 256  # float32 logits of 65,532 words: 64 MiB per chunk


class VisualVocabulary(nn.Module):
    """Features `[N, input_size]` of `grids` -> rows `[T, output_size]`, image after image.

    The softmax runs in float32 and is cast back, as in the reference; `CHUNK_ROWS` rows at a time, so that the peak
    memory does not grow with the picture.
    """

    def __init__(self, config: ProjectorConfig, tp: TensorParallel | None = None) -> None:
        super().__init__()
        assert config.vocabulary is not None
        self.config = config
        projection, norm = config.layers
        assert isinstance(projection, LinearLayer)
        assert isinstance(norm, NormLayer)
        self.head = ColumnParallelLinear(
            projection.input_size, {"": projection.output_size}, bias=False, tp=TensorParallel.single()
        )
        self.norm = nn.LayerNorm(norm.size, norm.eps)
        self.words = config.vocabulary.size
        self.table = nn.Parameter(torch.empty(self.words + config.vocabulary.indicators, config.output_size))

    def forward(self, features: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        words = self.table[: self.words]
        rows = [
            self.norm(self.head(chunk)).float().softmax(-1).to(chunk.dtype) @ words
            for chunk in merged_rows(features, grids, self.config).split(CHUNK_ROWS)
        ]
        return torch.cat(rows)

    def indicator(self, index: int) -> torch.Tensor:
        """Row number `index` of the table's last rows, `[output_size]`."""
        return self.table[self.words + index]
