"""Rows that are answered in the order in which they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from siglane.batch.form import Answer
from siglane.batch.row import BadRow, Row


def in_order(
    rows: Iterable[Row | BadRow], answer: Callable[[Iterator[Row]], Iterable[Answer]]
) -> Iterator[tuple[Row | BadRow, Answer | None]]:
    """Each row with its answer, None for one that cannot be asked. answer: gives one for each row, in order; it may
    read rows ahead."""
    waiting: deque[Row | BadRow] = deque()

    def asked() -> Iterator[Row]:
        for row in rows:
            waiting.append(row)
            if isinstance(row, Row):
                yield row

    for found in answer(asked()):
        while isinstance(bad := waiting.popleft(), BadRow):
            yield bad, None
        yield bad, found
    yield from ((row, None) for row in waiting)
