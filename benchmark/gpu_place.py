"""Where a stage of `gpu_report.py` runs, what it measures with, and how it says what it found: a line of JSON each."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

logger = logging.getLogger(__name__)


class Place(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    small: bool

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, call: Callable[[], object], repeats: int = 15) -> float:
        """Median, each with its wait; two before are not counted."""
        found = []
        for _ in range(repeats + 2):
            self.wait()
            begin = time.perf_counter()
            call()
            self.wait()
            found.append(1e3 * (time.perf_counter() - begin))
        return statistics.median(found[2:])

    def matmul_rate(self) -> float:
        """FLOP/s of a product of matrices."""
        side = 256 if self.small else 8192
        a, b = (torch.randn(side, side, device=self.device, dtype=self.dtype) for _ in range(2))
        return 2 * side**3 / self.milliseconds(lambda: a @ b) * 1e3

    def copy_rate(self) -> float:
        """Bytes per second that are read or written."""
        source = torch.zeros(1 << (20 if self.small else 31), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.milliseconds(lambda: target.copy_(source)) * 1e3

    @contextmanager
    def defaults(self) -> Iterator[None]:
        """Of what is built: on the device at once, in its dtype."""
        torch.set_default_dtype(self.dtype)
        with self.device:
            yield
        torch.set_default_dtype(torch.float32)


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def goal(name: str, value: object, wanted: str, passed: bool) -> None:
    say(goal=name, value=value, wanted=wanted, passed=passed)


def share(name: str, found: float, floor: float, least: float, **facts: object) -> None:
    """A time in ms beside the least that the card's rates allow."""
    reached = round(100 * floor / found, 1)
    say(what=name, ms=round(found, 3), floor_ms=round(floor, 3), percent_of_floor=reached, **facts)
    if least:
        goal(name, f"{reached} % of its floor", f"at least {least:g} %", reached >= least)


@contextmanager
def part(name: str) -> Iterator[None]:
    """A part of a stage: what it raises is said, and the next part runs."""
    try:
        yield
    except Exception as error:
        logger.exception("%s", name)
        say(part=name, error=f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
