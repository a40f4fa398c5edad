"""What the processor multiplies."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

from llvmlite import binding

ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA, SYS_ARCH_PRCTL = 0x1023, 18, 158  # Linux, x86-64


@dataclass(frozen=True)
class Processor:
    """tiles: tiles of bytes (AMX); bfloat16: registers of bfloat16, and it looks up bytes and words (AVX512-BF16 and
    VBMI)."""

    tiles: bool
    bfloat16: bool


@functools.cache
def this_processor() -> Processor:
    """Asks the system, where there are tiles, to let this process use them."""
    features = binding.get_host_cpu_features()
    tiles = bool(features.get("amx-tile") and features.get("amx-int8")) and _may_use_tiles()
    return Processor(tiles, bool(features.get("avx512bf16") and features.get("avx512vbmi")))


def _may_use_tiles() -> bool:
    return bool(ctypes.CDLL(None).syscall(SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0)
