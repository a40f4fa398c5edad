"""A tiny random Ovis2.5 checkpoint with the real one's keys and tensor names, and the modules that hold its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from checkpoints import (
    Written,
    build_tokenizer,
    config_of,
    decoder_of,
    merged,
    preprocessor_of,
    randomise,
    saved_experts,
    tower_of,
    write_checkpoint,
    write_json,
)
from tokenizers import AddedToken
from torch import nn
from transformers import PreTrainedTokenizerFast

PATCH, STRIDE = 4, 2
FACTOR = PATCH * STRIDE
Bounds = tuple[int, int]
SMALL: Bounds = (24 * 24, 64 * 64)
LARGE: Bounds = (112 * 112, 448 * 448)  # the reference's defaults for blocks of 8 instead of 32 pixels: same rows
INDICATORS = 4
THINKING = ("<think>", "</think>")


def write_ovis2_5_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    tied: bool = False,
    head_stored: bool = True,
    rope: bool = True,
    position_side: int = 6,
    visual_vocabulary: int = 52,
    thinking: bool = True,
    chat_template: str | None = None,
    added: Sequence[AddedToken] = (),
    architecture: bool = True,
    bounds: Bounds = SMALL,
    bounds_stated: bool = True,
    flags: Mapping[str, Any] | None = None,
    vit_flags: Mapping[str, Any] | None = None,
    language_kind: str = "qwen3",
    language_facts: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Written:
    """head_stored: whether a tied model's file holds `llm.lm_head.weight` too;
    bounds_stated: whether preprocessor_config.json has them, which no released one has;
    language_kind, language_facts: model_type of the decoder, and keys of its configuration; flags, vit_flags: keys to
    add to, or (None) to take from, config.json and its vit_config."""
    tokenizer = _tokenizer(thinking, chat_template)
    tokenizer.add_tokens(list(added))
    tower = tower_of(seed, patch_size=PATCH, image_size=position_side * PATCH, vision_use_head=False)
    language = decoder_of(
        language_kind, seed + 1, vocab_size=len(tokenizer) + 7, head_dim=16, max_position_embeddings=8192,
        tie_word_embeddings=tied, rope_theta=1e6, **(language_facts or {}),
    )  # fmt: skip
    words = visual_vocabulary - INDICATORS
    head = nn.Sequential(nn.Linear(32 * STRIDE**2, words, bias=False), nn.LayerNorm(words))
    randomise(head, seed + 2)
    width = language.config.hidden_size
    vte = torch.randn(visual_vocabulary, width, generator=torch.Generator().manual_seed(seed + 9))
    vte[words:] = torch.tensor([[3.0], [-3.0], [5.0], [-5.0]])  # distinct constants: an exchanged indicator shows

    state = {f"visual_tokenizer.vit.vision_model.{key}": value for key, value in tower.state_dict().items()}
    state |= {f"visual_tokenizer.head.{key}": value for key, value in head.state_dict().items()}
    spoken = saved_experts(language.state_dict())
    state |= {f"llm.{key}": value for key, value in spoken.items() if key != "lm_head.weight"}
    if head_stored:
        state["llm.lm_head.weight"] = language.lm_head.weight
    state["vte.weight"] = vte
    vit = merged(_vit_config(rope, position_side), vit_flags)
    root = merged(_root_config(language, vit, visual_vocabulary, architecture), flags)
    end, pad = tokenizer.get_vocab()["<|im_end|>"], tokenizer.get_vocab()["<|endoftext|>"]
    generation = {"eos_token_id": [end, pad], "pad_token_id": pad, "temperature": 0.6}
    stated = {"min_pixels": bounds[0], "max_pixels": bounds[1]} if bounds_stated else {}
    preprocessor = preprocessor_of(
        "SiglipImageProcessor", 2, do_center_crop=False, do_convert_rgb=True, size={"height": 512, "width": 512},
        **stated,
    )  # fmt: skip
    write_checkpoint(folder, root, state, tokenizer, preprocessor=preprocessor, generation=generation, dtype=dtype)
    return Written(folder, tower, head, language, tokenizer)


EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True,
}  # fmt: skip


def write_ovis2_6_checkpoint(
    folder: Path,
    *,
    moe: bool = False,
    section: str = "text_config",
    flags: Mapping[str, Any] | None = None,
    **more: Any,
) -> Written:
    """Ovis2.6: 2B's dense language model, or 30B-A3B's with experts. section: of the language model in config.json;
    more: options of `write_ovis2_5_checkpoint`."""
    kind = {"language_kind": "qwen3_moe", "language_facts": EXPERTS} if moe else {}
    named = {
        "architectures": [f"Ovis2_6{'_Moe' * moe}ForCausalLM"],
        "model_type": f"ovis2_6{'_moe' * moe}",
    }
    written = write_ovis2_5_checkpoint(folder, flags={**named, **(flags or {})}, **kind, **more)
    raw = json.loads((folder / "config.json").read_text())
    raw[section] = raw.pop("llm_config")
    write_json(folder / "config.json", raw)
    return written


def _tokenizer(thinking: bool, chat_template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer(())
    if thinking:  # not special in Qwen3's tokenizer either
        tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in THINKING])
    tokenizer.chat_template = chat_template
    return tokenizer


def _vit_config(rope: bool, position_side: int) -> dict[str, Any]:
    return {
        "_name_or_path": "google/siglip2-so400m-patch16-512", "attention_dropout": 0.0,
        "fullatt_block_indexes": None, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 32,
        "hidden_stride": STRIDE, "image_size": position_side * PATCH, "intermediate_size": 40, "layer_norm_eps": 1e-6,
        "model_type": "siglip2_navit", "num_attention_heads": 2, "num_channels": 3, "num_hidden_layers": 3,
        "num_patches": -1, "patch_size": PATCH, "preserve_original_pe": True, "temporal_patch_size": 1,
        "torch_dtype": "float32", "use_rope": rope, "window_size": 112,
    }  # fmt: skip


def _root_config(language: Any, vit: Mapping[str, Any], rows: int, architecture: bool) -> dict[str, Any]:
    text = config_of(language)
    return {
        **({"architectures": ["Ovis2_5"]} if architecture else {}),
        "auto_map": {"AutoConfig": "configuration_ovis2_5.Ovis2_5_Config"},
        "conversation_formatter_class": "Qwen3ConversationFormatter",
        "hidden_size": text["hidden_size"], "llm_config": text, "max_position_embeddings": 8192,
        "model_type": "ovis2_5" if architecture else "ovis", "num_attention_heads": 4, "torch_dtype": "bfloat16",
        "visual_vocab_size": rows, "vit_config": dict(vit), "vocab_size": text["vocab_size"],
    }  # fmt: skip
