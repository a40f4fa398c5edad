"""Token embeddings and the output head, cut over the vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from siglane.nn.cpu.product import linear
from siglane.nn.linear import ShardedModule, check_shape, copy_checked
from siglane.nn.parallel import TensorParallel


class VocabTable(ShardedModule):
    """A table `[vocab_size, hidden_size]`, rows cut over ranks when they divide.

    `forward(ids [T]) -> [T, hidden_size]`.
    """

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp.divides(vocab_size)
        self.vocab_size, self.hidden_size = vocab_size, hidden_size

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Those of this rank's share, which `ids` count from its beginning."""
        raise NotImplementedError

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same table as an output head: `[T, hidden_size]` -> `[T, vocab_size]`, whole on every rank."""
        raise NotImplementedError

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.from_all_ranks(ids, self.rows)

    def from_all_ranks(self, ids: torch.Tensor, rows: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """rows: as `self.rows`."""
        if self.tp.size == 1:
            return rows(ids)
        share = self.vocab_size // self.tp.size
        local = ids - self.tp.rank * share
        mine = (local >= 0) & (local < share)
        return self.tp.all_reduce(rows(local.clamp(0, share - 1)) * mine.unsqueeze(-1))


class VocabParallelEmbedding(VocabTable):
    """`VocabTable` of floats. `logits` is for tied weights, or an untied head of its own."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel) -> None:
        super().__init__(vocab_size, hidden_size, tp)
        self.weight = nn.Parameter(torch.empty(vocab_size // self.tp.size, hidden_size))

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.tp.all_gather(linear(hidden, self.weight))

    def load_part(self, name: str, part: str, tensor: torch.Tensor) -> None:
        check_shape(tensor, self.vocab_size, self.hidden_size)
        copy_checked(self.weight, self.tp.shard(tensor, 0))
