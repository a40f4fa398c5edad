"""Tiny random nanoVLM checkpoints of every release, with the real keys and tensor names, and the modules that hold the
same weights: transformers' SiglipVisionModel, a linear layer, transformers' LlamaForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from checkpoints import (
    State,
    Written,
    build_tokenizer,
    decoder_of,
    merged,
    randomise,
    tower_of,
    write_checkpoint,
)
from tokenizers import AddedToken
from torch import nn
from transformers import SiglipVisionModel

Era = Literal["0.1", "0.2", "grid", "current"]
Names = Literal["head", "embedding", "both", "untied"]
ERAS: tuple[Era, ...] = ("0.1", "0.2", "grid", "current")

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# the tokenizer's own template, as SmolLM2's: its system turn must never be seen
WITH_SYSTEM_TURN = "{{ '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}" + CHATML


def write_nanovlm_checkpoint(
    folder: Path,
    *,
    era: Era = "current",
    seed: int = 0,
    image_size: int = 32,
    patch_size: int = 8,
    factor: int = 2,
    tiles: int = 3,
    enlarge: bool = False,
    own_tokenizer: bool = True,
    names: Names = "head",
    flags: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Written:
    """tiles: `max_img_size` in tiles; own_tokenizer: else it lies in `folder`/tokenizer and `lm_tokenizer` names it;
    names: under which names the token embedding is stored ("untied": a head of its own); flags: keys to add to, or
    (None) to take from, config.json."""
    tokenizer = build_tokenizer(())
    tokenizer.chat_template = WITH_SYSTEM_TURN
    tokenizer_folder = folder if own_tokenizer else folder / "tokenizer"
    tokenizer.save_pretrained(str(tokenizer_folder))
    extra = _extra_tokens(era)
    base = len(tokenizer)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in extra.values()])

    tower = tower_of(
        seed, num_hidden_layers=2, layer_norm_eps=1e-6, vision_use_head=False, image_size=image_size,
        patch_size=patch_size,
    )  # fmt: skip
    language = decoder_of(
        "llama", seed + 2, vocab_size=len(tokenizer), max_position_embeddings=8192, rms_norm_eps=1e-5,
        tie_word_embeddings=names != "untied", attention_bias=False, mlp_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    projection = nn.Linear(32 * factor**2, language.config.hidden_size, bias=False)
    randomise(projection, seed + 1)

    rows = (image_size // patch_size // factor) ** 2
    config = _config(era, tower, language, base, extra, factor, rows)
    config["lm_tokenizer"] = str(tokenizer_folder)
    if era in ("grid", "current"):
        config["max_img_size"] = tiles * image_size
    if era == "current":
        config["resize_to_max_side_len"] = enlarge
    write_checkpoint(folder, merged(config, flags), stored(tower, projection, language, names), dtype=dtype)
    return Written(folder, tower, projection, language, tokenizer)


def stored(tower: SiglipVisionModel, projection: nn.Linear, language: Any, names: Names = "head") -> State:
    """The tensors of the modules under nanoVLM's names."""
    return _tower_state(tower) | {"MP.proj.weight": projection.weight} | _language_state(language, names)


def _extra_tokens(era: Era) -> dict[str, str]:
    if era == "0.1":
        return {}
    found = {"image_token": "<|image|>"}
    if era == "current":
        found["global_image_token"] = "<|global_image|>"
    if era != "0.2":
        found |= {f"r{row}c{column}": f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)}
    return found


def _config(
    era: Era, tower: SiglipVisionModel, language: Any, base: int, extra: dict[str, str], factor: int, rows: int
) -> dict[str, Any]:
    """What `asdict` gives of that release's dataclass."""
    vision, text = tower.config, language.config
    config: dict[str, Any] = {
        "vit_hidden_dim": vision.hidden_size, "vit_inter_dim": vision.intermediate_size,
        "vit_patch_size": vision.patch_size, "vit_img_size": vision.image_size,
        "vit_n_heads": vision.num_attention_heads, "vit_dropout": 0.0, "vit_n_blocks": vision.num_hidden_layers,
        "vit_ln_eps": 1e-06, "vit_cls_flag": False, "vit_model_type": "google/siglip-base-patch16-224",
        "lm_hidden_dim": text.hidden_size, "lm_inter_dim": text.intermediate_size, "lm_rms_eps": 1e-05,
        "lm_re_base": 100000, "lm_max_position_embeddings": 8192, "lm_vocab_size": text.vocab_size,
        "lm_n_heads": text.num_attention_heads, "lm_n_kv_heads": text.num_key_value_heads, "lm_dropout": 0.0,
        "lm_n_blocks": text.num_hidden_layers, "lm_attn_scaling": 1.0, "lm_max_length": 128, "lm_use_tokens": False,
        "lm_tie_weights": text.tie_word_embeddings, "lm_model_type": "HuggingFaceTB/SmolLM2-135M",
        "mp_pixel_shuffle_factor": factor, "vlm_load_backbone_weights": True, "vlm_checkpoint_path": "checkpoints",
    }  # fmt: skip
    if era == "0.1":
        return config | {"lm_eos_token_id": 0}
    config |= {
        "lm_base_vocab_size": base, "extra_token_amount": len(extra), "vlm_extra_tokens": extra,
        "mp_image_token_length": rows, "hf_repo_name": "nanoVLM",
    }  # fmt: skip
    return config | ({"lm_chat_template": CHATML} if era == "current" else {})


def _tower_state(tower: SiglipVisionModel) -> State:
    theirs = tower.state_dict()
    state = {
        "patch_embedding.conv.weight": theirs["embeddings.patch_embedding.weight"],
        "patch_embedding.conv.bias": theirs["embeddings.patch_embedding.bias"],
        "patch_embedding.position_embedding": theirs["embeddings.position_embedding.weight"][None],
        "layer_norm.weight": theirs["post_layernorm.weight"],
        "layer_norm.bias": theirs["post_layernorm.bias"],
    }
    for number in range(tower.config.num_hidden_layers):
        ours, layer = f"blocks.{number}", f"encoder.layers.{number}"
        for leaf in ("weight", "bias"):
            parts = [theirs[f"{layer}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            state[f"{ours}.attn.qkv_proj.{leaf}"] = torch.cat(parts)
            state[f"{ours}.attn.out_proj.{leaf}"] = theirs[f"{layer}.self_attn.out_proj.{leaf}"]
            state[f"{ours}.ln1.{leaf}"] = theirs[f"{layer}.layer_norm1.{leaf}"]
            state[f"{ours}.ln2.{leaf}"] = theirs[f"{layer}.layer_norm2.{leaf}"]
            state[f"{ours}.mlp.fc1.{leaf}"] = theirs[f"{layer}.mlp.fc1.{leaf}"]
            state[f"{ours}.mlp.fc2.{leaf}"] = theirs[f"{layer}.mlp.fc2.{leaf}"]
    return {f"vision_encoder.{key}": value for key, value in state.items()}


def _language_state(language: Any, names: Names) -> State:
    theirs = language.state_dict()
    head_dim = language.config.hidden_size // language.config.num_attention_heads
    frequencies = 100000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    state = {"norm.weight": theirs["model.norm.weight"], "rotary_embd.inv_freq": frequencies}
    if names != "embedding":
        state["head.weight"] = theirs["lm_head.weight"]
    if names != "head":
        state["token_embedding.weight"] = theirs["model.embed_tokens.weight"]
    for number in range(language.config.num_hidden_layers):
        ours, layer = f"blocks.{number}", f"model.layers.{number}"
        state[f"{ours}.norm1.weight"] = theirs[f"{layer}.input_layernorm.weight"]
        state[f"{ours}.norm2.weight"] = theirs[f"{layer}.post_attention_layernorm.weight"]
        for part in ("q_proj", "k_proj", "v_proj"):
            state[f"{ours}.attn.{part}.weight"] = theirs[f"{layer}.self_attn.{part}.weight"]
        state[f"{ours}.attn.out_proj.weight"] = theirs[f"{layer}.self_attn.o_proj.weight"]
        for part in ("gate_proj", "up_proj", "down_proj"):
            state[f"{ours}.mlp.{part}.weight"] = theirs[f"{layer}.mlp.{part}.weight"]
    return {f"decoder.{key}": value for key, value in state.items()}
