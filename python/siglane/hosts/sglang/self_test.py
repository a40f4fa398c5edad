"""An engine of SGLang's with the shipped model reads a sign: `python -m siglane.hosts.sglang.self_test`."""

from __future__ import annotations

import base64
import os
import time
from typing import Any

import torch

from siglane.weights.demo import FOLDERS, demo_folder

MODEL, PICTURE, EXPECTED = "demo-native", "cafe.png", "CAFE"
PROMPT = "<|im_start|>user\n<image>\nWhat does the sign say?<|im_end|>\n<|im_start|>assistant\n"


def prepare_environment() -> None:
    """Without a GPU SGLang must be told so before it is imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")


def options() -> dict[str, Any]:
    """SGLang's arguments: little memory on a GPU; without one, nothing that needs its compiled kernels."""
    common = {"model_path": str(demo_folder() / FOLDERS[MODEL]), "max_total_tokens": 2048, "log_level": "error"}
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

    picture = base64.b64encode((demo_folder() / "pictures" / PICTURE).read_bytes()).decode()
    begin = time.perf_counter()
    engine = sglang.Engine(**options())
    try:
        started = time.perf_counter()
        sampling = {"temperature": 0, "max_new_tokens": 8}
        answer = engine.generate(PROMPT, sampling, image_data=[f"data:image/png;base64,{picture}"])["text"]
        seconds = time.perf_counter() - started
    finally:
        engine.shutdown()
    if answer != EXPECTED:
        raise SystemExit(f"the shipped model read {answer!r} from {PICTURE}, it should read {EXPECTED!r}")
    print(f"an engine starts in {started - begin:.0f} s and reads {answer} from {PICTURE} in {seconds:.1f} s")


if __name__ == "__main__":
    main()
