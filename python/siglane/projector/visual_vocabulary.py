"""Ovis' visual vocabulary: each merged patch becomes a mixture of learned rows (arXiv:2405.20797; formats.md 3.4).

The head gives logits over a vocabulary of tens of thousands of visual words; the row the language model reads is the
expectation of the table under their softmax. The table's last rows are indicators, which no patch can reach.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from siglane.config.projector import LinearLayer, NormLayer, ProjectorConfig
from siglane.nn.cpu.product import linear
from siglane.nn.linear import ColumnParallelLinear, ShardedModule, check_shape
from siglane.nn.norm import ShardedLayerNorm
from siglane.nn.parallel import TensorParallel
from siglane.nn.plan import Rule, WeightPlan
from siglane.projector.downsample import merged_rows
from siglane.types import Grid

CHUNK_ROWS = 256  # float32 logits of 65,532 words: 64 MiB per chunk


class VisualVocabulary(ShardedModule):
    """Features `[N, input_size]` of `grids` -> rows `[T, output_size]`, image after image.

    The words are cut over the ranks: logits, norm, softmax and the rows of the table. Indicators are on every rank, and
    so is everything when the number of words does not divide. The softmax runs in float32 and is cast back, as in the
    reference; `CHUNK_ROWS` rows at a time, so that the peak memory does not grow with the picture.
    """

    def __init__(self, config: ProjectorConfig, tp: TensorParallel | None = None) -> None:
        super().__init__()
        assert config.vocabulary is not None
        self.config, self.vocabulary = config, config.vocabulary
        projection, norm = config.layers
        assert isinstance(projection, LinearLayer)
        assert isinstance(norm, NormLayer)
        self.tp = (tp or TensorParallel.single()).divides(self.vocabulary.size)
        self.head = ColumnParallelLinear(
            projection.input_size, {"": projection.output_size}, bias=projection.bias, tp=self.tp
        )
        self.norm = ShardedLayerNorm(norm.size, norm.eps, self.tp)
        self.words = self.vocabulary.size // self.tp.size
        self.table = nn.Parameter(torch.empty(self.words + self.vocabulary.indicators, config.output_size))

    def forward(self, features: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        chunks = merged_rows(features, grids, self.config).split(CHUNK_ROWS)
        return torch.cat([self._mixture(chunk) for chunk in chunks])

    def _mixture(self, merged: torch.Tensor) -> torch.Tensor:
        """`[rows, merged width]` -> `[rows, output_size]`."""
        probabilities = self._softmax(self.norm(self.head(merged)).float()).to(merged.dtype)
        return self.tp.all_reduce(linear(probabilities, self.table[: self.words].T))

    def _softmax(self, logits: torch.Tensor) -> torch.Tensor:
        """This rank's share of the probabilities, from its share of the logits."""
        if self.tp.size == 1:
            return logits.softmax(-1)
        largest = self.tp.all_gather(logits.amax(-1, keepdim=True)).amax(-1, keepdim=True)
        weights = (logits - largest).exp()
        return weights / self.tp.all_reduce(weights.sum(-1, keepdim=True))

    def indicator(self, index: int) -> torch.Tensor:
        """Row number `index` of the table's last rows, `[output_size]`."""
        return self.table[self.words + index]

    def load_part(self, name: str, part: str, tensor: torch.Tensor) -> None:
        check_shape(tensor, self.vocabulary.size + self.vocabulary.indicators, self.config.output_size)
        with torch.no_grad():
            self.table[: self.words].copy_(self.tp.shard(tensor[: self.vocabulary.size], 0))
            self.table[self.words :].copy_(tensor[self.vocabulary.size :])


def vocabulary_plan(config: ProjectorConfig) -> WeightPlan:
    """The head, its norm and the table under the names that the configuration gives them."""
    head, norm = config.layers
    assert isinstance(head, LinearLayer)
    assert isinstance(norm, NormLayer)
    assert config.vocabulary is not None
    return WeightPlan((
        Rule(f"{head.name}.weight", "head.weight"),
        Rule(f"{norm.name}.{{leaf}}", "norm.{leaf}"),
        Rule(f"{config.vocabulary.name}.weight", "table"),
    ))  # fmt: skip
