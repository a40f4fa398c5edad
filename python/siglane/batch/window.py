"""Which of the rows that were read ahead is asked next."""

from __future__ import annotations

from collections import OrderedDict, deque

from siglane.batch.row import Row

WINDOW_BYTES = 256 << 20


class Window:
    """Rows with equal keys leave one after the other, groups in the order of their first row. Equal pictures are then
    encoded once and equal beginnings computed once, however small the engine's caches are.

    rows, most_bytes: that may be held; one row always may. A row that waits is passed by at most as many as fit.
    """

    def __init__(self, rows: int, most_bytes: int = WINDOW_BYTES) -> None:
        self._rows, self._most_bytes = rows, most_bytes
        self._groups: OrderedDict[str, deque[Row]] = OrderedDict()
        self._count = self._bytes = self._in_a_row = 0

    def __len__(self) -> int:
        return self._count

    def has_room(self, beside: int) -> bool:
        """beside: rows that were taken and are not written yet."""
        held = self._count + beside
        return held == 0 or (held < self._rows and self._bytes < self._most_bytes)

    def add(self, row: Row) -> None:
        self._groups.setdefault(row.key or f"row {row.number}", deque()).append(row)
        self._count += 1
        self._bytes += row.size

    def take(self) -> Row:
        key, group = next(iter(self._groups.items()))
        row = group.popleft()
        self._in_a_row += 1
        if not group or self._in_a_row >= self._rows:  # a group that is added to all the time lets others pass
            self._in_a_row = 0
            del self._groups[key]
            if group:
                self._groups[key] = group
        self._count -= 1
        self._bytes -= row.size
        return row
