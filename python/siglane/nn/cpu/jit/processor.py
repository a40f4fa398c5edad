"""What the processor multiplies."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from llvmlite import binding

ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA, SYS_ARCH_PRCTL = 0x1023, 18, 158  # Linux, x86-64

Dot = Literal["avx512", "avxvnni", "avx2"]
DOTS: Mapping[Dot, tuple[str, ...]] = {  # what each takes, as LLVM names it; the best first
    "avx512": ("avx512vnni",),
    "avxvnni": ("avxvnni", "avx2", "fma", "f16c"),
    "avx2": ("avx2", "fma", "f16c"),
}


@dataclass(frozen=True)
class Processor:
    """dot: how it multiplies bytes: by VNNI in registers of 512 or of 256 bits, or by AVX2 as words; tiles: tiles of
    bytes (AMX); bfloat16: registers of bfloat16, and it looks up bytes and words (AVX512-BF16 and VBMI)."""

    dot: Dot
    tiles: bool = False
    bfloat16: bool = False


def dot_of(features: Mapping[str, bool]) -> Dot | None:
    """The best of a processor; None where loops are not compiled. features: by LLVM's names."""
    return next((dot for dot, needed in DOTS.items() if all(features.get(name) for name in needed)), None)


def this_processor() -> Processor:
    """Where loops are compiled."""
    found = found_processor()
    assert found is not None
    return found


@functools.cache
def found_processor() -> Processor | None:
    """None where loops are not compiled. Asks the system, where there are tiles, to let this process use them."""
    features = binding.get_host_cpu_features()
    dot = dot_of(features)
    if dot is None:
        return None
    tiles = bool(features.get("amx-tile") and features.get("amx-int8")) and _may_use_tiles()
    return Processor(dot, tiles, bool(features.get("avx512bf16") and features.get("avx512vbmi")))


def _may_use_tiles() -> bool:
    return bool(ctypes.CDLL(None).syscall(SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0)
