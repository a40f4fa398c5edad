"""Token embeddings and the output head, cut over the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from siglane.nn.cpu.product import linear
from siglane.nn.linear import ShardedModule, check_shape, copy_checked
from siglane.nn.parallel import TensorParallel


class VocabParallelEmbedding(ShardedModule):
    """A table `[vocab_size, hidden_size]`, rows cut over ranks when they divide.

    `forward(ids [T]) -> [T, hidden_size]`; `logits(hidden [T, hidden_size]) -> [T, vocab_size]` is the same table as
    an output head (tied weights, or an untied head of its own).
    """

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp.divides(vocab_size)
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.weight = nn.Parameter(torch.empty(vocab_size // self.tp.size, hidden_size))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.tp.size == 1:
            return F.embedding(ids, self.weight)
        local = ids - self.tp.rank * self.weight.shape[0]
        mine = (local >= 0) & (local < self.weight.shape[0])
        rows = F.embedding(local.clamp(0, self.weight.shape[0] - 1), self.weight)
        return self.tp.all_reduce(rows * mine.unsqueeze(-1))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.tp.all_gather(linear(hidden, self.weight))

    def load_part(self, name: str, part: str, tensor: torch.Tensor) -> None:
        check_shape(tensor, self.vocab_size, self.hidden_size)
        copy_checked(self.weight, self.tp.shard(tensor, 0))
