"""Tiny random checkpoints in LLaVA's original layout, made from transformers' LLaVA-OneVision by other names."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from checkpoints import merged, write_checkpoint, write_json
from llava_onevision_checkpoint import LlavaOnevision, write_llava_onevision_checkpoint

NAMES = (
    ("model.language_model.", "model."),
    ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("", ""),
)
LANGUAGE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
)  # fmt: skip
TOWER = "google-siglip"  # a folder beside the weights, whose config.json has a block more than is ever run


def write_llava_qwen_checkpoint(
    folder: Path,
    *,
    tower: str = "inside",
    tied: bool = True,
    head_stored: bool = False,
    image_size: int = 60,
    most: int = 3,
    seed: int = 0,
    keys: Mapping[str, Any] | None = None,
) -> LlavaOnevision:
    """The model as transformers runs it. tower: whether its tensors are "inside" or "beside", in a SigLIP's own folder;
    most: pinpoints as of `write_llava_onevision_checkpoint`; keys: added to config.json, None takes one out."""
    with tempfile.TemporaryDirectory() as elsewhere:
        written = write_llava_onevision_checkpoint(
            Path(elsewhere), tied=tied, image_size=image_size, most=most, seed=seed,
            processor={"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        )  # fmt: skip
    state = {_renamed(name): tensor for name, tensor in written.model.state_dict().items()}
    if tied and not head_stored:
        del state["lm_head.weight"]
    vision = {name: tensor for name, tensor in state.items() if ".vision_tower." in name}
    config = written.model.config
    text = config.text_config.to_dict()
    root = {name: text[name] for name in LANGUAGE} | {
        "architectures": ["LlavaQwenForCausalLM"], "model_type": "llava_qwen", "rope_theta": 10000.0,
        "hidden_act": "silu", "use_sliding_window": False, "sliding_window": 131072, "tie_word_embeddings": tied,
        "mm_vision_tower": TOWER, "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": config.vision_config.hidden_size,
        "mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": config.vision_aspect_ratio,
        "image_grid_pinpoints": [[width, height] for height, width in config.image_grid_pinpoints],
        "mm_newline_position": "one_token", "mm_spatial_pool_mode": "bilinear", "mm_use_im_start_end": False,
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model", "image_token_index": 151646,
        "tokenizer_model_max_length": 4096, "unfreeze_mm_vision_tower": True,
    }  # fmt: skip
    if tower == "beside":
        root |= {"mm_tunable_parts": "mm_mlp_adapter", "unfreeze_mm_vision_tower": False}
        state = {name: tensor for name, tensor in state.items() if name not in vision}
    _write_tower(folder / TOWER, config.vision_config, vision if tower == "beside" else {})
    generation = {"eos_token_id": [written.tokenizer.eos_token_id]}
    write_checkpoint(folder, merged(root, keys), state, written.tokenizer, generation=generation)
    written.folder = folder
    return written


def _renamed(name: str) -> str:
    before, after = next(pair for pair in NAMES if name.startswith(pair[0]))
    return after + name.removeprefix(before)


def _write_tower(folder: Path, config: Any, stored: Mapping[str, torch.Tensor]) -> None:
    """A whole SigLIP where there are tensors: its last block and its texts are nobody's."""
    blocks = config.num_hidden_layers
    raw: dict[str, Any] = json.loads(config.to_json_string(use_diff=False)) | {"num_hidden_layers": blocks + 1}
    if not stored:
        folder.mkdir(parents=True)
        write_json(folder / "config.json", raw)
        return
    state = {name.partition("vision_tower.vision_tower.")[2]: tensor for name, tensor in stored.items()}
    last = f"vision_model.encoder.layers.{blocks - 1}."
    state |= {
        name.replace(last, f"vision_model.encoder.layers.{blocks}."): torch.randn_like(tensor)
        for name, tensor in state.items()
        if name.startswith(last)
    }
    state |= {"logit_scale": torch.ones(1), "text_model.final_layer_norm.weight": torch.ones(4)}
    write_checkpoint(folder, {"model_type": "siglip", "vision_config": raw, "text_config": {}}, state)
