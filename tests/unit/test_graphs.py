"""Steps that are recorded: largest first, in one pool, and without graphs where a capture fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from siglane.engine.graphs import Recording, buckets_up_to, record

ALL = (1, 2, 4, 8, 16, 32, 64)


@pytest.mark.parametrize(("rows", "buckets"), [(1, (1,)), (5, (1, 2, 4, 8)), (8, (1, 2, 4, 8)), (64, ALL), (999, ALL)])
def test_a_bucket_for_every_number_of_rows_up_to_the_largest(rows: int, buckets: tuple[int, ...]) -> None:
    assert buckets_up_to(rows) == buckets


class Recorder:
    """Captures nothing; fails where it is told to."""

    def __init__(self, fails_at: int = 0) -> None:
        self.fails_at, self.prepared, self.pools = fails_at, list[int](), list[Any]()

    def prepare(self, size: int) -> Callable[[], torch.Tensor]:
        self.prepared.append(size)
        return lambda: torch.full((size,), size)

    def capture(self, step: Callable[[], torch.Tensor], pool: Any) -> Recording:
        self.pools.append(pool)
        if len(step()) == self.fails_at:
            raise RuntimeError("operation not permitted when stream is capturing")
        return Recording(step, pool or "the first one's")


def test_the_largest_is_recorded_first_and_shares_its_pool() -> None:
    recorder = Recorder()
    replays = record((1, 4, 2), recorder.prepare, recorder.capture)
    assert recorder.prepared == [4, 2, 1]
    assert recorder.pools == [None, "the first one's", "the first one's"]
    assert {size: replay().tolist() for size, replay in replays.items()} == {4: [4] * 4, 2: [2] * 2, 1: [1]}


def test_a_failed_capture_is_loud_and_leaves_steps_without_graphs(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(fails_at=2)
    with caplog.at_level(logging.ERROR, "siglane"):
        assert list(record((4, 2, 1), recorder.prepare, recorder.capture)) == [4]
    assert recorder.prepared == [4, 2]
    assert "a step of 2 rows could not be captured" in caplog.text
    assert "not permitted" in caplog.text
