"""Runs inside vLLM's own environment: greedy answers of a checkpoint to a list of prompts.

stdin: JSON {"model": folder, "limits": {"image": most, "video": most}, "max_tokens": n, "prompts": [{"prompt": rendered
text with vLLM's placeholders, "media": .npz of arrays "image.0", "video.0", ...}]}.
Last line of stdout: JSON {"vllm": version, "answers": [{"prompt_tokens", "token_ids", "logprobs"}]}.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def register_ovis2_5() -> None:
    """The configuration class that the model's repository brings along as remote code; it only holds values."""
    from transformers import AutoConfig, PreTrainedConfig, Qwen3Config

    class VitConfig(PreTrainedConfig):
        model_type = "siglip2_navit"

    class OvisConfig(PreTrainedConfig):
        model_type = "ovis2_5"

        def __init__(self, llm_config: Any = None, vit_config: Any = None, **rest: Any) -> None:
            self.llm_config = llm_config if isinstance(llm_config, Qwen3Config) else Qwen3Config(**(llm_config or {}))
            self.vit_config = vit_config if isinstance(vit_config, VitConfig) else VitConfig(**(vit_config or {}))
            super().__init__(**rest)

        def get_text_config(self, decoder: Any = None, encoder: Any = None) -> Qwen3Config:
            return self.llm_config

    AutoConfig.register("ovis2_5", OvisConfig)


def resize_by_pillow() -> None:
    """transformers prefers torchvision where there is one. Some of its resized pixels are a grey level beside those of
    Pillow, which siglane follows, and that alone moves log-probabilities by up to 6e-3."""
    from transformers.models.auto import image_processing_auto

    by_pillow = image_processing_auto.DEFAULT_TO_PIL_BACKEND_IMAGE_PROCESSORS
    by_pillow += ["SiglipImageProcessor", "LlavaOnevisionImageProcessor"]


def read(prompt: dict[str, str]) -> dict[str, Any]:
    """A prompt as vLLM takes it."""
    import numpy as np
    from PIL import Image

    media: dict[str, list[Any]] = {}
    with np.load(prompt["media"]) as arrays:
        for name, pixels in arrays.items():
            kind = name.split(".")[0]
            media.setdefault(kind, []).append(Image.fromarray(pixels) if kind == "image" else pixels)
    return {"prompt": prompt["prompt"], **({"multi_modal_data": media} if media else {})}


def answer(job: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import LLM, SamplingParams

    engine = LLM(
        job["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        max_num_seqs=1,  # two videos of unlike length in one step end its LLaVA-OneVision with an assertion
        limit_mm_per_prompt=job["limits"],
        skip_mm_profiling=True,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(
        temperature=0.0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False, logprobs=1
    )
    answers = []
    for found in engine.generate([read(prompt) for prompt in job["prompts"]], sampling, use_tqdm=False):
        said = found.outputs[0]
        chosen = [step[token].logprob for step, token in zip(said.logprobs, said.token_ids, strict=True)]
        prompt_tokens = len(found.prompt_token_ids)
        answers.append({"prompt_tokens": prompt_tokens, "token_ids": list(said.token_ids), "logprobs": chosen})
    return answers


def main() -> None:
    register_ovis2_5()
    resize_by_pillow()
    import vllm

    print("\n" + json.dumps({"vllm": vllm.__version__, "answers": answer(json.load(sys.stdin))}), flush=True)


if __name__ == "__main__":
    main()
