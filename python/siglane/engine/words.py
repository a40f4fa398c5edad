"""The numbers of one step on their way to the device: integers of the host, copied together, read as views."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from siglane.nn.device import host_memory


class Written:
    """Lists of i64 one behind another in host memory, pinned where the device copies from it by itself.

    lengths: of each list. The memory is written again only when the copy has been made.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.memory = host_memory((capacity,), torch.int64, device)
        self.lengths: list[int] = []
        self._numbers = self.memory.numpy()
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def write(self, lists: Sequence[Sequence[int] | npt.NDArray[np.int64]]) -> None:
        """RuntimeError when they are more than the memory holds."""
        if self._copied is not None:
            self._copied.synchronize()
        self.lengths = [len(one) for one in lists]
        count = sum(self.lengths)
        if count > len(self._numbers):
            raise RuntimeError(f"a step has {count} numbers, {len(self._numbers)} are planned for")
        first = 0
        for one, length in zip(lists, self.lengths, strict=True):
            self._numbers[first : first + length] = one
            first += length

    def copy_to(self, memory: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Enqueues the copy to `memory` i64, as long at least -> each list where it lies there."""
        count = sum(self.lengths)
        views = memory[:count]
        views.copy_(self.memory[:count], non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(memory.device))  # a thread's own device may be another
        return views.split(self.lengths)


class Held(NamedTuple):
    """The first `used` pages of a sequence, which has `row` of the table."""

    row: int
    pages: list[int]
    used: int


class PageTable:
    """i32 `[rows, columns]` on the device: the pages of each running sequence, a row each, `Sequence.table_row`.

    Zeros, the scratch page, where nothing was written.
    """

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.pages = torch.zeros(rows, columns, dtype=torch.int32, device=device)
        self._known = [Held(row, [], 0) for row in range(rows)]

    def news(self, held: Iterable[Held]) -> tuple[list[int], list[int], list[int]]:
        """Rows, columns and pages that the table does not have. A sequence's list of pages only grows: another list is
        another sequence, or one that runs again."""
        rows, columns, pages = list[int](), list[int](), list[int]()
        for row, table, used in held:
            known = self._known[row]
            first = known.used if known.pages is table else 0
            rows += [row] * (used - first)
            columns += range(first, used)
            pages += table[first:used]
        return rows, columns, pages

    def put(self, held: Iterable[Held], rows: torch.Tensor, columns: torch.Tensor, pages: torch.Tensor) -> None:
        """The `news` of `held`, which are known only now: a step that failed before tells them again."""
        if len(pages):
            self.pages.index_put_((rows, columns), pages.int())
            for one in held:
                self._known[one.row] = one
