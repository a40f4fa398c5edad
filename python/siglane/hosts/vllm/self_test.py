"""An engine of vLLM's with the shipped model reads a sign: `python -m siglane.hosts.vllm.self_test`."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from siglane.hosts import sign


def options() -> dict[str, Any]:
    """vLLM's arguments: a model of no class of its own, little memory, and nothing that is compiled first."""
    memory = {"gpu_memory_utilization": 0.1} if torch.cuda.is_available() else {"dtype": "float32"}
    return {"model": sign.model("demo"), "max_num_seqs": 1, "enforce_eager": True, **memory}


def main() -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    begin = time.perf_counter()
    engine = LLM(**options())
    started = time.perf_counter()
    sampling = SamplingParams(temperature=0, max_tokens=sign.TOKENS)
    (answer,) = engine.chat(sign.messages(), sampling, use_tqdm=False)
    print(sign.report(begin, started, answer.outputs[0].text))


if __name__ == "__main__":
    main()
