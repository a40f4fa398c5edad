"""An engine of SGLang's with the shipped model reads a sign: `python -m siglane.hosts.sglang.self_test`."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from siglane.hosts import sign


def prepare_environment() -> None:
    """Without a GPU SGLang must be told so before it is imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")


def options() -> dict[str, Any]:
    """SGLang's arguments: little memory on a GPU; without one, nothing that needs its compiled kernels."""
    common = {"model_path": sign.model("demo-native"), "max_total_tokens": 2048, "log_level": "error"}
    if torch.cuda.is_available():
        return common | {"mem_fraction_static": 0.1, "disable_cuda_graph": True}
    return common | {
        "device": "cpu",
        "dtype": "float32",
        "attention_backend": "torch_native",
        "mm_attention_backend": "sdpa",
        "sampling_backend": "pytorch",
        "disable_overlap_schedule": True,
        "disable_cuda_graph": True,
    }


def main() -> None:
    prepare_environment()
    import sglang

    begin = time.perf_counter()
    engine = sglang.Engine(**options())
    try:
        started = time.perf_counter()
        sampling = {"temperature": 0, "max_new_tokens": sign.TOKENS}
        answer = engine.generate(sign.PROMPT, sampling, image_data=[sign.picture_url()])["text"]
        line = sign.report(begin, started, answer)
    finally:
        engine.shutdown()
    print(line)


if __name__ == "__main__":
    main()
