"""Whether loops can be compiled here."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
from typing import TYPE_CHECKING

from siglane.types import Activation

if TYPE_CHECKING:
    from siglane.nn.cpu.jit.between_calls import CompiledBetween
    from siglane.nn.cpu.jit.calls import Heads
    from siglane.nn.cpu.jit.coded_calls import CompiledBlock
    from siglane.nn.cpu.jit.layer import CompiledLayer, NativeLayer
    from siglane.nn.cpu.jit.segments_calls import SegmentAttention

logger = logging.getLogger(__name__)


def compiled_layer() -> type[CompiledLayer] | None:
    """What computes rows of 8-bit layers, and few of 4-bit ones, in one call; None where loops cannot be compiled: they
    then are several calls of torch."""
    if not compiles():
        return None
    from siglane.nn.cpu.jit.layer import CompiledLayer

    return CompiledLayer


@functools.cache
def heads(head_dim: int) -> Heads | None:
    """The same for what lies between products: rotary positions, the paged cache, attention; None for heads that are no
    whole registers too."""
    if head_dim % 32 or head_dim > 256 or not compiles():
        return None
    from siglane.nn.cpu.jit.calls import Heads

    return Heads(head_dim)


@functools.cache
def between() -> CompiledBetween | None:
    """The same for what lies between the products of an encoder block."""
    if not compiles():
        return None
    from siglane.nn.cpu.jit.between_calls import CompiledBetween

    return CompiledBetween()


def native_layer() -> type[NativeLayer] | None:
    """An 8-bit layer as the next one reads it."""
    if not compiles():
        return None
    from siglane.nn.cpu.jit.layer import NativeLayer

    return NativeLayer


@functools.cache
def coded_block(activation: Activation) -> CompiledBlock | None:
    """All of an encoder block but its attention; None for other activations too."""
    if not compiles():
        return None
    from siglane.nn.cpu.jit.between import SIGMOIDS
    from siglane.nn.cpu.jit.coded_calls import CompiledBlock

    return CompiledBlock(activation) if activation in SIGMOIDS else None


@functools.cache
def segments(head_dim: int) -> SegmentAttention | None:
    """Attention over packed segments of bfloat16; None where the processor does not multiply it, where it has tiles
    (AMX), which torch's own attention uses, and for heads that are no whole groups of eight."""
    if head_dim % 8 or not compiles():
        return None
    from siglane.nn.cpu.jit.processor import this_processor

    processor = this_processor()
    if processor.tiles or not processor.bfloat16:
        return None
    from siglane.nn.cpu.jit.segments_calls import SegmentAttention

    return SegmentAttention(head_dim)


@functools.cache
def compiles() -> bool:
    """Whether llvmlite, AVX2 and torch's threads (OpenMP's) are there."""
    if importlib.util.find_spec("llvmlite") is None:
        logger.info("small loops: by torch; compiled ones are faster: pip install 'siglane[cpu]'")
        return False
    from llvmlite import binding

    from siglane.nn.cpu.jit.processor import found_processor

    if found_processor() is None or not _has_threads():
        logger.info("small loops: by torch")
        return False
    logger.info("small loops: compiled by LLVM %s", binding.llvm_version_info[0])
    return True


def missing_products() -> str:
    """Why there are no exact products of 8 bits, where neither oneDNN nor loops have them, and what to do."""
    if importlib.util.find_spec("llvmlite") is None:
        return "8-bit products of this processor take compiled loops: pip install 'siglane[cpu]'"
    return "this processor and system have no exact 8-bit products (VNNI, AMX, or AVX2 on Linux)"


def _has_threads() -> bool:
    try:
        ctypes.CDLL(None).GOMP_parallel  # noqa: B018 - looked up, not called
    except AttributeError:
        return False
    return True
