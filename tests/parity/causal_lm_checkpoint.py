"""Tiny random Qwen2, Qwen3, Qwen3-MoE and Llama checkpoints without eyes, as transformers saves them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from checkpoints import build_tokenizer, randomise
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from siglane.verify.references.files import unset

Kind = Literal["qwen2", "qwen3", "qwen3_moe", "llama"]
CLASSES: dict[Kind, tuple[Any, Any]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
    "max_position_embeddings": 2048,
    "eos_token_id": None,
    "bos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "head_dim": 16, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True,
    "mlp_only_layers": [1],
}  # fmt: skip
TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Written:
    folder: Path
    model: Any
    tokenizer: PreTrainedTokenizerFast

    def prompt_ids(self, question: str) -> list[int]:
        turns = [{"role": "user", "content": question}]
        ids: list[int] = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True).input_ids
        return ids


def write_causal_lm_checkpoint(
    folder: Path, kind: Kind = "qwen2", *, tied: bool = False, template: str | None = TEMPLATE, **facts: Any
) -> Written:
    """facts: of the transformers configuration, over SIZES."""
    config_class, model_class = CLASSES[kind]
    model = unset(lambda: model_class(config_class(**SIZES | {"tie_word_embeddings": tied} | facts))).eval()
    randomise(model, seed=3)
    model.generation_config.eos_token_id = None
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer = build_tokenizer(())
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return Written(folder, model, tokenizer)
