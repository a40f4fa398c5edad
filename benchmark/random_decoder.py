"""A text-only folder with random weights, by default of Qwen2.5-0.5B's shape."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from serving_model import tokenizer  # which makes recipes/ importable

from recipes.demo.tokenizer import CHAT_TEMPLATE


@dataclass(frozen=True)
class Shape:
    """Of a random Qwen2 with tied embeddings; with experts, each of `intermediate` columns, a Qwen3-MoE."""

    layers: int = 24
    hidden: int = 896
    intermediate: int = 4864
    heads: int = 14
    kv_heads: int = 2
    vocab: int = 151_936
    experts: int = 0

    def config(self) -> dict[str, Any]:
        sparse = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "head_dim": self.hidden // self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": min(8, self.experts),
            "moe_intermediate_size": self.intermediate,
            "norm_topk_prob": True,
        }
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 32_768,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "bos_token_id": self.vocab - 4,
            "eos_token_id": self.vocab - 2,
            **(sparse if self.experts else {}),
        }


def write_random(folder: Path, shape: Shape) -> None:
    """Weights of a spread that keeps answers from repeating one token."""
    width, kv_width = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).bfloat16()

    tensors = {"model.embed_tokens.weight": matrix(shape.vocab, width), "model.norm.weight": torch.ones(width)}
    sizes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (kv_width, width),
        "self_attn.v_proj": (kv_width, width),
        "self_attn.o_proj": (width, width),
        **({"mlp.gate": (shape.experts, width)} if shape.experts else {}),
    }
    for mlp in [f"mlp.experts.{number}" for number in range(shape.experts)] or ["mlp"]:
        sizes |= {f"{mlp}.{name}_proj": (shape.intermediate, width) for name in ("gate", "up")}
        sizes[f"{mlp}.down_proj"] = (width, shape.intermediate)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}{name}.weight": matrix(*size) for name, size in sizes.items()}
        for name in ("q", "k", "v") if not shape.experts else ():
            tensors[f"{prefix}self_attn.{name}_proj.bias"] = torch.zeros(sizes[f"self_attn.{name}_proj"][0])
        for name in ("q_norm", "k_norm") if shape.experts else ():
            tensors[f"{prefix}self_attn.{name}.weight"] = torch.ones(width // shape.heads)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = torch.ones(width)
    folder.mkdir(parents=True)
    tokenizer(shape.vocab).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "config.json").write_text(json.dumps(shape.config()))
    save_file(tensors, folder / "model.safetensors")
