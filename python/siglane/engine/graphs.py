"""Steps that are the same operations on the same memory, recorded once for each size and replayed as CUDA graphs."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

logger = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
WARM_UPS = 2  # eager ones before a capture: kernels are compiled, workspaces allocated


class Recording(NamedTuple):
    """replay: does again what was recorded, and returns where the result lies, until another one is replayed; pool: of
    memory that further recordings may share."""

    replay: Callable[[], torch.Tensor]
    pool: Any


Capture = Callable[[Callable[[], torch.Tensor], Any], Recording]


def buckets_up_to(rows: int) -> tuple[int, ...]:
    """Sizes for steps of 1 to `rows` rows, the last of them `rows` or more where `BUCKETS` goes so far."""
    return (*(size for size in BUCKETS if size < rows), *[size for size in BUCKETS if size >= rows][:1])


def record(
    buckets: Sequence[int], prepare: Callable[[int], Callable[[], torch.Tensor]], capture: Capture
) -> dict[int, Callable[[], torch.Tensor]]:
    """What replays a step of each size. prepare: fills the memory of a step with padding, and gives what computes it.
    Largest first, in one pool, so that the others need no memory of their own.

    Where a capture fails, that size and smaller ones stay as they are: without a graph.
    """
    if not buckets:
        return {}
    begin, pool, replays = time.monotonic(), None, dict[int, Callable[[], torch.Tensor]]()
    for size in sorted(buckets, reverse=True):
        try:
            recording = capture(prepare(size), pool)
        except Exception as error:
            message = "a step of %d rows could not be captured (%s: %s); it and smaller ones run without CUDA graphs"
            logger.error(message, size, type(error).__name__, error)
            break
        replays[size], pool = recording
    logger.info("captured steps of %s rows in %.1f s", list(replays), time.monotonic() - begin)
    return replays


def capture_on_cuda(step: Callable[[], torch.Tensor], pool: Any) -> Recording:
    """pool: of an earlier recording, or None."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    gc.collect()  # nothing that dies within the capture may free memory of others
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return Recording(replay, graph.pool() if pool is None else pool)
