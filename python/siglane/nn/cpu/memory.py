"""Memory as the C library and the system keep it."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch

LARGE = 2 << 20  # bytes of a large page
ADVISE_LARGE, COLLAPSE = 14, 25  # Linux's MADV_HUGEPAGE, and MADV_COLLAPSE of 6.1 and later


def return_freed() -> None:
    """Gives what was freed back to the system. glibc keeps much of it where small and large pieces came in turn; with
    other libraries nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def in_large_pages(memory: torch.Tensor, *, filled: bool = True) -> None:
    """Asks the system to keep a tensor, dense or packed by oneDNN, in pages of 2 MB where it can: few rows read it at
    the memory's speed, and to look up pages of 4 KB takes a fifth of that. Elsewhere nothing happens.

    filled: False for memory that is not written to yet, and takes its pages as it is.
    """
    if sys.platform != "linux":
        return
    if memory.is_mkldnn:
        first, size = torch.ops.mkldnn.data_ptr(memory), torch.ops.mkldnn._nbytes(memory)
    else:
        first, size = memory.data_ptr(), memory.nbytes
    if size < LARGE:
        return
    begin, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, (first + size) // mmap.PAGESIZE * mmap.PAGESIZE
    advise = ctypes.CDLL(None).madvise
    for advice in (ADVISE_LARGE, COLLAPSE) if filled else (ADVISE_LARGE,):
        advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)
