"""One offline vLLM engine, driven through a pipe by `vllm_host.vllm_engine`. It runs in vLLM's own environment, whose
processes import this file too (multiprocessing's spawn), so it imports nothing at the top that costs time.
"""

from __future__ import annotations

import sys
from multiprocessing.connection import Connection
from typing import Any


def answer(engine: Any, conversations: list[Any], tokens: int, more: dict[str, Any]) -> list[dict[str, Any]]:
    """Greedy answers to conversations that are submitted at once, or one error for all of them."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    try:
        found = engine.chat(conversations, sampling, use_tqdm=False, **more)
    except Exception as error:
        return [{"error": f"{type(error).__name__}: {error}"}] * len(conversations)
    return [
        {
            "prompt_tokens": len(one.prompt_token_ids),
            "token_ids": list(one.outputs[0].token_ids),
            "cached_tokens": one.num_cached_tokens,
        }
        for one in found
    ]


def main(pipe: Connection) -> None:
    from vllm import LLM

    engine = LLM(**pipe.recv())
    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        pipe.send(answer(engine, *job))


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
