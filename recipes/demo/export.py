"""Writing the demo model as a VILA checkpoint: folders `llm/`, `vision_tower/` and `mm_projector/` (formats.md 5.1).

`transformers` loads the first two as Qwen2ForCausalLM and SiglipVisionModel. Tensors are stored in half precision, the
configurations say float32: the file is small and the arithmetic is not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import Tokenizer

from recipes.demo.model import PROJECTOR, TILE, DemoModel
from recipes.demo.tokenizer import END, PAD, save_tokenizer, special_id
from siglane.config.language import LanguageConfig
from siglane.config.vision import VisionConfig
from siglane.lm.qwen import QwenModel, qwen_plan
from siglane.projector.build import projector_plan
from siglane.vision.tower import SiglipVisionModel, tower_plan
from siglane.weights.export import checkpoint_tensors

Tensors = dict[str, torch.Tensor]


def export(model: DemoModel, tokenizer: Tokenizer, folder: Path) -> None:
    """A complete checkpoint in `folder`, at most 12 MB."""
    end, pad = special_id(tokenizer, END), special_id(tokenizer, PAD)
    language = _language_config(model.language.config, end, pad)
    vision = _vision_config(model.tower.config)
    projector = {"model_type": "v2l_projector", "mm_projector_type": PROJECTOR}
    root = {
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        "llm_cfg": language,
        "vision_tower_cfg": vision,
        "mm_projector_cfg": projector,
        "hidden_size": model.language.config.hidden_size,
        "mm_hidden_size": model.tower.config.hidden_size,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "cls_patch",
        "image_aspect_ratio": "dynamic",
        "min_tiles": 1,
        "max_tiles": 1,
        "video_max_tiles": 1,
        "num_video_frames": 8,
        "fps": 0.0,
        "s2": False,
        "dynamic_s2": False,
        "model_dtype": "torch.float32",
    }
    write_json(folder / "config.json", root)
    write_json(folder / "llm" / "config.json", language)
    generation = {"do_sample": False, "eos_token_id": [end], "pad_token_id": pad}
    write_json(folder / "llm" / "generation_config.json", generation)
    save_tokenizer(tokenizer, folder / "llm")
    write_tensors(folder / "llm", language_tensors(model.language))
    write_json(folder / "vision_tower" / "config.json", vision)
    write_json(folder / "vision_tower" / "preprocessor_config.json", preprocessor_config(TILE, 3))
    write_tensors(folder / "vision_tower", vision_tensors(model.tower))
    write_json(folder / "mm_projector" / "config.json", projector)
    projector_weights = checkpoint_tensors(model.projector, projector_plan(model.projector.config))
    write_tensors(folder / "mm_projector", projector_weights)


def vision_tensors(tower: SiglipVisionModel) -> Tensors:
    """Hub names. The block after the last one that is used passes its input on, so `hidden_states[-1] == [-2]`."""
    config = tower.config
    tensors = checkpoint_tensors(tower, tower_plan(config))
    tensors["vision_model.post_layernorm.weight"] = torch.ones(config.hidden_size)
    tensors["vision_model.post_layernorm.bias"] = torch.zeros(config.hidden_size)
    block = {name: torch.zeros_like(value) for name, value in tensors.items() if ".layers.0." in name}
    for number in range(config.depth, config.num_hidden_layers):
        tensors |= {name.replace(".layers.0.", f".layers.{number}."): value for name, value in block.items()}
    return tensors


def language_tensors(model: QwenModel) -> Tensors:
    return checkpoint_tensors(model, qwen_plan(model.config))


def _vision_config(config: VisionConfig) -> dict[str, Any]:
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_channels": config.num_channels,
        "image_size": TILE,
        "patch_size": config.patch_size,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": config.layer_norm_eps,
        "attention_dropout": 0.0,
        "vision_use_head": False,
        "torch_dtype": "float32",
    }


def _language_config(config: LanguageConfig, end: int, pad: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": pad,
        "torch_dtype": "float32",
    }


def preprocessor_config(side: int, resample: int) -> dict[str, Any]:
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": resample,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tensors(folder: Path, tensors: Tensors) -> None:
    stored = {name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in tensors.items()}
    (folder / "model.safetensors").write_bytes(save(stored, metadata={"format": "pt"}))
