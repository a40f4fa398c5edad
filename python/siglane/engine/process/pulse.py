"""Whether an engine still moves: what it counts while it works, and who notices when the count stands still."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Self

from torch import nn

LONGEST_TURN = 1.0
TURNS_PER_LIMIT = 4


def turn_seconds(limit: float) -> float:
    """How often to look, or to give a sign, where `limit` seconds without one are too many."""
    return min(LONGEST_TURN, limit / TURNS_PER_LIMIT)


class Pulse:
    """Counts the moves of a thread that computes. A forward moves with every layer it enters, so that a long one is
    told from one that hangs; while the thread waits for others, it moves by definition."""

    def __init__(self) -> None:
        self._moves = 0
        self._waiting = False

    def move(self, *_: object) -> None:
        self._moves += 1

    def follow(self, models: Iterable[nn.Module]) -> None:
        """Counts every layer that a forward of `models` enters, and every module that belongs to no layer: a hook in
        each module would make small steps slower by a twentieth."""
        for module in dict.fromkeys(module for model in models for module in _layers(model)):
            module.register_forward_pre_hook(self.move)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While the thread waits for what others do."""
        self._waiting = True
        try:
            yield
        finally:
            self._moves += 1
            self._waiting = False

    def moves(self) -> float:
        """Another number than before whenever there was a move."""
        return time.monotonic() if self._waiting else self._moves


def work_done() -> float:
    """What this process has computed and read so far: whole seconds of CPU time, of which its watching threads do not
    use one in hours, blocks and pages from and to disks. Stands still while a load waits for what never comes."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return int(used.ru_utime + used.ru_stime) + used.ru_inblock + used.ru_oublock + used.ru_majflt


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield child
        if not isinstance(module, nn.ModuleList):
            yield from _layers(child)


class Stillness:
    """Whether `moves` has given the same number for `limit` seconds, asked every `turn_seconds`.

    Only time in which this process runs counts: after a Ctrl-Z, or a night of a closed laptop, both sides begin anew.
    """

    def __init__(self, moves: Callable[[], float], limit: float) -> None:
        self.limit = limit
        self._moves = moves
        self._seen, self._still, self._last = moves(), 0.0, time.monotonic()

    def look(self) -> bool:
        moves, now = self._moves(), time.monotonic()
        passed = min(now - self._last, 2 * turn_seconds(self.limit))
        self._still = self._still + passed if moves == self._seen else 0.0
        self._seen, self._last = moves, now
        return self._still >= self.limit


class Watch:
    """Calls `on_still` once, on a thread of its own, when there is such a stillness. Ends with the context."""

    def __init__(self, moves: Callable[[], float], limit: float, on_still: Callable[[], None]) -> None:
        self.stillness = Stillness(moves, limit)
        self._on_still = on_still
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="engine-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _look(self) -> None:
        while not self._ended.wait(turn_seconds(self.stillness.limit)):
            if self.stillness.look():
                self._on_still()
                return
