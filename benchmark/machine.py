"""What this machine can do at best: the arithmetic ceilings that every benchmark prints beside its figures.

python benchmark/machine.py
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch

from siglane.nn.cpu.packing import packed_weight
from siglane.nn.cpu.product import linear

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@torch.inference_mode()
def gemm_rate(
    product: Product = torch.nn.functional.linear, repeats: int = 9, *, rows: int = 2304, packed: bool = False
) -> float:
    """float32 multiply-adds of a matrix product of SigLIP-base's MLP shape, in FLOP/s; the median of `repeats`.

    product: torch's own by default, which is what transformers runs on; packed: with weights as by `nn/cpu/packing.py`.
    """
    a, b = torch.randn(rows, 768), torch.randn(3072, 768)
    if packed:
        b = packed_weight(b)
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        product(a, b)
        seconds.append(time.perf_counter() - begin)
    return 2 * rows * 768 * 3072 / statistics.median(seconds[1:])


def onednn_rate() -> float:
    """The same product by the kernel that siglane's layers use (`siglane/nn/cpu/product.py`)."""
    return gemm_rate(linear)


def microseconds(function: Callable[[torch.Tensor], torch.Tensor], repeats: int = 199) -> float:
    """Of a function of one head's scores at 576 patches; the median of `repeats`."""
    scores = torch.randn(576, 576)
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        function(scores)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:]) * 1e6


def description() -> dict[str, str | int]:
    """Hardware and versions, for the JSON of a result."""
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rates = {"torch_gflops": gemm_rate() / 1e9, "siglane_gflops": onednn_rate() / 1e9}
    for rows in (2, 8, 16):  # of a step in which so many answers grow by one token
        for packed in (False, True):
            name = f"siglane_{rows}_rows{'_packed' * packed}_gflops"
            rates[name] = gemm_rate(linear, 99, rows=rows, packed=packed) / 1e9
    # what the attention of long segments chooses between (siglane/nn/attention.py)
    rates["softmax_us"] = microseconds(lambda scores: scores.softmax(-1))
    rates["exp2_us"] = microseconds(torch.exp2)
    print(json.dumps({**description(), **rates}, indent=1))
