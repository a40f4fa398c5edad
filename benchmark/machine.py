"""What this machine can do at best: the arithmetic ceiling that every benchmark prints beside its figures."""

from __future__ import annotations

import platform
import statistics
import time

import torch


def gemm_rate(repeats: int = 9) -> float:
    """float32 multiply-adds of a matrix product of SigLIP-base's MLP shape, in FLOP/s; the median of `repeats`."""
    a, b = torch.randn(2304, 768), torch.randn(3072, 768)
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        torch.nn.functional.linear(a, b)
        seconds.append(time.perf_counter() - begin)
    return 2 * 2304 * 768 * 3072 / statistics.median(seconds[1:])


def description() -> dict[str, str | int]:
    """Hardware and versions, for the JSON of a result."""
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
