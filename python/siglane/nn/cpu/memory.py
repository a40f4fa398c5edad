"""Memory that the C library keeps for itself."""

from __future__ import annotations

import ctypes


def return_freed() -> None:
    """Gives what was freed back to the system. glibc keeps much of it where small and large pieces came in turn; with
    other libraries nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
