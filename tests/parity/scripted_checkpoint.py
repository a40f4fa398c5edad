"""A real Ovis2.5 checkpoint whose language model says what a script tells it: each token decides the next one.

The blocks add nothing to the residual stream, so the last norm reads the embedding of the last token alone, and the
head maps it to its successor. Everything else (tower, engine, tokenizer, files) is as in any checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from checkpoints import Written
from ovis2_5_checkpoint import write_ovis2_5_checkpoint
from safetensors.torch import load_file, save_file

# "\n" ends a prompt that leaves thinking open, "\n\n" one that has closed it, and the text forced on a model
THINKER = MappingProxyType(
    {
        "\n": "<think>", "<think>": " ", " ": "a", "a": "b", "b": "c", "c": "d", "d": "e", "e": "\t",
        "\t": "</think>", "</think>": "\n\n", "\n\n": "x", "x": "y", "y": "z", "z": "<|im_end|>",
    }
)  # fmt: skip
THOUGHT, ANSWER = "abcde", "xyz"
THOUGHT_TOKENS = 9  # the tags and the white space too
SURE = 8.0  # by how much, roughly, a successor's logit exceeds the others


def write_scripted_checkpoint(folder: Path, script: Mapping[str, str] = THINKER, seed: int = 0) -> Written:
    """script: tokens by their text, each with its successor."""
    written = write_ovis2_5_checkpoint(folder, seed=seed)
    state = load_file(folder / "model.safetensors")
    for key, value in state.items():
        if key.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight")) and key.startswith("llm."):
            value.zero_()
    state["llm.model.norm.weight"].fill_(1)
    head, table = state["llm.lm_head.weight"].zero_(), state["llm.model.embed_tokens.weight"]
    for text, successor in script.items():
        (token_id,), (next_id,) = written.encode(text), written.encode(successor)
        head[next_id] += SURE * torch.nn.functional.normalize(table[token_id], dim=0)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return written
