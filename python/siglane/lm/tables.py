"""The embedding table and the output head of a language model of fewer bits: int8, a scale for each row.

The rows of a table are kept in the turned basis (`rotation.py`), where no channel stands out, and are turned back as
they are read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import nn

from siglane.nn.cpu.int8 import Int8Codes, WideInt8Linear
from siglane.nn.cpu.product import linear
from siglane.nn.cpu.table import PackedRows
from siglane.nn.embedding import VocabTable
from siglane.nn.linear import check_shape
from siglane.nn.parallel import TensorParallel

M = TypeVar("M")


class IncomingTable(VocabTable, Generic[M]):
    """What stands for a table while a checkpoint is read: `make` is given this rank's values, and nothing is copied."""

    def __init__(self, table: VocabTable, make: Callable[[torch.Tensor], M]) -> None:
        super().__init__(table.vocab_size, table.hidden_size, table.tp)
        self.weight = table.get_parameter("weight")
        self._make, self._made = make, list[M]()

    def load_part(self, name: str, part: str, tensor: torch.Tensor) -> None:
        """ValueError when a second tensor comes, which is one with other values: equal ones are left out before."""
        check_shape(tensor, self.vocab_size, self.hidden_size)
        if self._made:
            raise ValueError("has other values than the table to which it is tied")
        self._made.append(self._make(self.tp.shard(tensor, 0)))

    def take(self) -> M:
        """What was made, once."""
        return self._made.pop()


class QuantisedTable(VocabTable):
    """An embedding table. basis: of its rows, a vector in each column."""

    def __init__(
        self, table: VocabTable, codes: torch.Tensor | PackedRows, scale: torch.Tensor, basis: torch.Tensor
    ) -> None:
        super().__init__(table.vocab_size, table.hidden_size, table.tp)
        self.codes, self.scale, self.basis = codes, scale, basis

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return linear(self._turned_rows(ids), self.basis)

    def turned(self, ids: torch.Tensor) -> torch.Tensor:
        """`forward` in the basis of the blocks: as the rows are kept."""
        return self.from_all_ranks(ids, self._turned_rows)

    def _turned_rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self.codes[ids].float().mul_(self.scale[ids, None]).to(self.basis.dtype)


class TiedTable(QuantisedTable):
    """A table that is its own head. gain: what the last norm's is in the turned basis, `[hidden_size, hidden_size]`."""

    def __init__(self, table: VocabTable, made: TiedCodes, basis: torch.Tensor, gain: torch.Tensor) -> None:
        super().__init__(table, made.rows, made.head.scale, basis)
        self.head, self.gain = made.head, gain

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.tp.all_gather(self.head(linear(hidden, self.gain)))


class TiedCodes:
    """The codes of a table, in memory once: those of the head's product."""

    def __init__(self, codes: Int8Codes) -> None:
        self.head = WideInt8Linear(codes, None)
        self.rows = PackedRows(self.head, codes.codes)


class QuantisedHead(nn.Module):
    """An output head of its own: `[T, hidden_size]` -> logits `[T, vocab_size]`, whole on every rank."""

    def __init__(self, linear: WideInt8Linear, tp: TensorParallel) -> None:
        super().__init__()
        self.linear, self.tp = linear, tp

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.tp.all_gather(self.linear(hidden))
