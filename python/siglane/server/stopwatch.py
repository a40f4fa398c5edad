"""What the stages of a request take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple


class Interval(NamedTuple):
    """begin, end: of the monotonic clock."""

    stage: str
    begin: float
    end: float


class Stopwatch:
    """Seconds by stage, and when they were."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.intervals: list[Interval] = []
        self._last = time.monotonic()

    def start(self) -> None:
        """Leaves out the time since the last note."""
        self._last = time.monotonic()

    def note(self, stage: str) -> None:
        """Books the time since the last note under `stage`."""
        begin, self._last = self._last, time.monotonic()
        self.add(stage, self._last - begin)
        self.intervals.append(Interval(stage, begin, self._last))

    def share(self, seconds: Mapping[str, float]) -> None:
        """Books `seconds` of stages that threads worked at side by side; the time since the last note is theirs in
        proportion."""
        begin, self._last = self._last, time.monotonic()
        whole = sum(seconds.values())
        for stage, part in seconds.items():
            self.add(stage, part)
            end = begin + (self._last - begin) * (part / whole if whole else 0.0)
            self.intervals.append(Interval(stage, begin, end))
            begin = end

    def follow(self, stages: Mapping[str, float], begin: float) -> None:
        """Stages that another process has measured, one after the other from `begin`."""
        for stage, seconds in stages.items():
            self.intervals.append(Interval(stage, begin, begin + seconds))
            begin += seconds

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
