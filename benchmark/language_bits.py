"""What 8 and 4 bits cost a language model: `python benchmark/language_bits.py MODEL TEXT [--tokens 2048]`.

MODEL is a folder of a text-only checkpoint or a chat model, TEXT a file. Prints the mean KL divergence to float32 of
the next token's distribution, how often the likeliest token is the same, and the perplexity: of siglane's 8 and 4 bits,
and of the scheme that llama.cpp calls Q8_0 (weights and rows in groups of 32 with a scale each), computed in float32.
All of them keep keys and values in 16 bits, as both engines do.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from siglane.families.model import load_model
from siglane.families.processor import load_processor
from siglane.lm.attention import SegmentAttention
from siglane.lm.qwen import QwenModel
from siglane.nn.embedding import VocabParallelEmbedding
from siglane.nn.quantise import Weight, float_layers, quantised
from siglane.weights.demo import open_model

GROUP, LEVELS = 32, 127


@torch.inference_mode()
def log_probabilities(model: QwenModel, ids: torch.Tensor, kept: torch.dtype = torch.float32) -> torch.Tensor:
    """Of the token after each of `ids`: `[T, vocab_size]`. kept: of keys and values."""
    attention = SegmentAttention([len(ids)])

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(layer, q, *(x.to(kept).to(x.dtype) for x in (k, v)))

    return model.logits(model(model.embed(ids), torch.arange(len(ids)), attend)).log_softmax(-1)


def in_groups(x: torch.Tensor) -> torch.Tensor:
    groups = x.unflatten(-1, (-1, GROUP))
    scale = (groups.abs().amax(-1, keepdim=True) / LEVELS).half().float().clamp_min(1e-12)
    return ((groups / scale).round() * scale).flatten(-2)


class GroupsLinear(nn.Module):
    """`y = x W^T + b` of a weight and of rows in groups."""

    def __init__(self, weight: Weight, bias: torch.Tensor | None) -> None:
        super().__init__()
        assert isinstance(weight, torch.Tensor)
        self.weight, self.bias = in_groups(weight), bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(in_groups(x), self.weight, self.bias)


@torch.inference_mode()
def round_in_groups(model: QwenModel) -> None:
    """Every linear layer, the table and the head, which is the last layer."""
    for parent, name, layer in float_layers(model):
        setattr(parent, name, quantised(layer, GroupsLinear))
    for table in {model.embed_tokens, model.lm_head or model.embed_tokens}:
        assert isinstance(table, VocabParallelEmbedding)
        head = GroupsLinear(table.weight, None)
        table.weight.copy_(head.weight)
        table.logits = head  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description="What 8 and 4 bits cost a language model.")
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    checkpoint = open_model(options.model)
    processor = load_processor(checkpoint)
    ids = torch.tensor(processor.tokenizer.encode(options.text.read_text())[: options.tokens])

    def load(**how: Any) -> QwenModel:
        return load_model(checkpoint, processor.config, device="cpu", dtype=torch.float32, **how).language

    def of_groups() -> QwenModel:
        model = load()
        round_in_groups(model)
        return model

    expected = log_probabilities(load(), ids)[:-1]
    contenders: dict[str, Callable[[], QwenModel]] = {
        "8 bit": lambda: load(quantization="8bit"),
        "Q8_0": of_groups,
        "4 bit": lambda: load(quantization="4bit"),
    }
    print(f"{len(ids)} tokens, perplexity of float32 {perplexity(expected, ids):.2f}")
    for name, make in contenders.items():
        found = log_probabilities(make(), ids, torch.float16)[:-1]
        divergence = (expected.exp() * (expected - found)).sum(-1).mean()
        same = (expected.argmax(-1) == found.argmax(-1)).float().mean()
        print(f"{name:6} KL {divergence:.4f}, same token {same:.1%}, perplexity {perplexity(found, ids):.2f}")


def perplexity(log_probabilities: torch.Tensor, ids: torch.Tensor) -> float:
    return math.exp(-float(log_probabilities.gather(1, ids[1:, None]).mean()))


if __name__ == "__main__":
    main()
