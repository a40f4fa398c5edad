"""How often batches may end the engine, so that a row that does leaves it to the server's clients."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# an engine that dies more often than `RESTARTS_ALLOWED` times in `RESTART_WINDOW_SECONDS` ends the server; what batches
# leave of that is for causes that are not theirs
MOST_DEATHS = 2


class DeathBudget:
    """Deaths under rows of batches within the last `seconds`. For any thread. now: the time, in seconds."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._now = seconds, now
        self._lock = threading.Lock()
        self._deaths: dict[int, float] = {}

    def note(self, life: int) -> None:
        """life: which engine has died; of all its rows the first one counts."""
        with self._lock:
            self._deaths.setdefault(life, self._now())

    @property
    def rest(self) -> float:
        """Seconds until batches may go on."""
        with self._lock:
            latest = sorted(self._deaths.values())[-MOST_DEATHS:]
        if len(latest) < MOST_DEATHS:
            return 0.0
        return max(0.0, latest[0] + self._seconds - self._now())
