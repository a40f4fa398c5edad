"""Whether loops can be compiled here."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from siglane.nn.cpu.jit.calls import Heads
    from siglane.nn.cpu.jit.layer import FewRows

logger = logging.getLogger(__name__)


@functools.cache
def few_rows() -> type[FewRows] | None:
    """What computes rows of 8-bit layers, and few of 4-bit ones, in one call; None where llvmlite, the processor's
    AVX512-VNNI or torch's threads (OpenMP's) are missing: they then are several calls of torch."""
    if importlib.util.find_spec("llvmlite") is None:
        logger.info("rows of 8-bit weights: by torch; compiled loops are faster: pip install 'siglane[cpu]'")
        return None
    from llvmlite import binding

    if not binding.get_host_cpu_features().get("avx512vnni") or not _has_threads():
        logger.info("rows of 8-bit weights: by torch")
        return None
    from siglane.nn.cpu.jit.layer import FewRows

    logger.info("rows of 8-bit weights: by loops that LLVM %s compiles", binding.llvm_version_info[0])
    return FewRows


@functools.cache
def heads(head_dim: int) -> Heads | None:
    """The same for what lies between products: rotary positions, the paged cache, attention; None for heads that are no
    whole registers too."""
    if head_dim % 32 or head_dim > 256 or few_rows() is None:
        return None
    from siglane.nn.cpu.jit.calls import Heads

    return Heads(head_dim)


def _has_threads() -> bool:
    try:
        ctypes.CDLL(None).GOMP_parallel  # noqa: B018 - looked up, not called
    except AttributeError:
        return False
    return True
