"""A few threads that prepare what is needed next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

PREPARE_THREADS = 4
PREPARE_AHEAD = 16  # prompts whose pictures are being read or wait for the engine


def ahead(
    prepare: Callable[[tuple[int, Item]], Result], items: Iterable[Item], most: int = PREPARE_AHEAD
) -> Iterator[Result]:
    """`prepare((number, item))` of every item, in order, computed by a few threads at most `most` items ahead."""
    waiting: deque[Future[Result]] = deque()
    numbered = enumerate(items)
    pool = ThreadPoolExecutor(PREPARE_THREADS, thread_name_prefix="siglane-prepare")
    try:
        while True:
            waiting.extend(pool.submit(prepare, item) for item in islice(numbered, most - len(waiting)))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
