"""How tests wait: for what happens, never for a time."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE = 120.0  # seconds; only what is broken takes as long, however many share the machine


def eventually(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """For what announces itself to nobody: a state, a figure, a file."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def wait_while(flag: Path) -> None:
    """Until it is gone. As an engine's `prepare`: none starts before."""
    while flag.exists():
        time.sleep(0.005)


def lines_of(path: Path) -> int:
    """How many have been written; 0 without a file."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[Any], seconds: float = PATIENCE) -> None:
    """Until `process`, which must not end before, has written so many."""

    def written() -> bool:
        assert process.poll() is None, process.communicate()
        return lines_of(path) >= count

    eventually(written, seconds)
