"""A port for a process that a test starts."""

from __future__ import annotations

import random
import socket
from contextlib import suppress


def free_port() -> int:
    """One on loopback that nobody has and nobody is given: below those that the system hands out by itself. A process
    takes its port after seconds of imports, and by then another suite's server, which asked for any, may have been
    given one from there."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
