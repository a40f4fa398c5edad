"""Memory as the C library and the system keep it."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

LARGE = 2 << 20  # bytes of a large page
DISCARD = 4  # Linux's MADV_DONTNEED
ADVISE_LARGE, COLLAPSE = 14, 25  # its MADV_HUGEPAGE, and MADV_COLLAPSE of 6.1 and later
MAPPINGS = Path("/proc/self/smaps")
MAPPING = re.compile(
    r"^(?P<begin>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<may>\S+) \S+ \S+ \d+ +(?P<file>/.*)\n(?P<facts>(?:\w+:.*\n)*)",
    re.MULTILINE,
)


def return_freed() -> None:
    """Gives what was freed back to the system. glibc keeps much of it where small and large pieces came in turn; with
    other libraries nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def return_pages_of(library: str) -> None:
    """Takes what was read of a library that has done its work out of this process's memory; what is needed again comes
    from its file again. library: the file's name. Elsewhere than on Linux nothing happens."""
    if sys.platform != "linux" or not MAPPINGS.exists():
        return
    for begin, end in clean_mappings(MAPPINGS.read_text(), library):
        _advise(begin, end, DISCARD)


def clean_mappings(listed: str, file: str) -> Iterator[tuple[int, int]]:
    """First address and end of each mapping of `file` that cannot be written to and holds no page of the process's own,
    as relocated ones are. listed: what MAPPINGS says."""
    for found in MAPPING.finditer(listed):
        clean = "w" not in found["may"] and re.search(r"^Anonymous: +0 kB$", found["facts"], re.MULTILINE)
        if clean and Path(found["file"]).name == file:
            yield int(found["begin"], 16), int(found["end"], 16)


def in_large_pages(memory: torch.Tensor, *, filled: bool = True) -> None:
    """Asks the system to keep a tensor, dense or packed by oneDNN, in pages of 2 MB where it can: few rows read it at
    the memory's speed, and to look up pages of 4 KB takes a fifth of that. Elsewhere nothing happens.

    filled: False for memory that is not written to yet, and takes its pages as it is.
    """
    if sys.platform != "linux":
        return
    first, size = span(memory)
    if size < LARGE:
        return
    begin, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, (first + size) // mmap.PAGESIZE * mmap.PAGESIZE
    for advice in (ADVISE_LARGE, COLLAPSE) if filled else (ADVISE_LARGE,):
        _advise(begin, end, advice)


def span(memory: torch.Tensor) -> tuple[int, int]:
    """First address and bytes of a tensor, dense or packed by oneDNN."""
    if memory.is_mkldnn:
        return torch.ops.mkldnn.data_ptr(memory), torch.ops.mkldnn._nbytes(memory)
    return memory.data_ptr(), memory.nbytes


def _advise(begin: int, end: int, advice: int) -> None:
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)
