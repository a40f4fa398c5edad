"""The configuration class that hosts and transformers see: what they need to build the language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from siglane.config.language import LanguageConfig
from siglane.weights.hub import Checkpoint

ARCHITECTURE = "SiglaneForConditionalGeneration"


class SiglaneConfig(PretrainedConfig):
    """config.json of a view (`view.py`).

    checkpoint: folder of the model's own files, where siglane reads everything else; adapter: of one that is merged
    into them, "" for none that lies elsewhere; text_config: the language model's; vision_config: hosts ask only
    whether there is one; image_token_id: stands at the places of images.
    """

    model_type = "siglane"

    def __init__(
        self,
        checkpoint: str = "",
        adapter: str = "",
        text_config: dict[str, Any] | None = None,
        vision_config: dict[str, Any] | None = None,
        image_token_id: int = 0,
        **others: Any,
    ) -> None:
        self.checkpoint, self.adapter = checkpoint, adapter
        facts = dict(text_config or {"model_type": "qwen2"})
        self.text_config = AutoConfig.for_model(facts.pop("model_type"), **facts)
        self.vision_config = vision_config
        self.image_token_id = image_token_id
        super().__init__(**others)

    def files(self) -> Checkpoint:
        """The model's own files."""
        return Checkpoint(Path(self.checkpoint), Path(self.adapter) if self.adapter else None)

    def get_text_config(self, decoder: Any = None, encoder: Any = None) -> PretrainedConfig:
        return self.text_config


def text_config(language: LanguageConfig, dtype: str) -> dict[str, Any]:
    """The facts of a language model under the names of the transformers class that has its architecture."""
    dense = "qwen3" if language.qk_norm else "qwen2" if language.qkv_bias else "llama"
    facts: dict[str, Any] = {
        "model_type": dense if language.experts is None else "qwen3_moe",
        "hidden_act": "silu",
        "tie_word_embeddings": language.tie_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": language.rope_theta},
        "rope_theta": language.rope_theta,
        "attention_bias": language.output_bias,
        "dtype": dtype,
    }
    same = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps",
    )  # fmt: skip
    facts |= {name: getattr(language, name) for name in same}
    if (experts := language.experts) is None:
        return facts
    return facts | {
        "num_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.size,
        "norm_topk_prob": experts.normalised,
        "decoder_sparse_step": experts.step,
        "mlp_only_layers": list(experts.dense_layers),
    }
