"""What a program of a test's own takes of memory, as source to stand in front of it."""

from __future__ import annotations

# of this program alone: getrusage counts what its parent was when it started it
PEAK = r"""
import re
from pathlib import Path

def peak():
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
"""
