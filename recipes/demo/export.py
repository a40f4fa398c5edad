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
from siglane.config.projector import LinearLayer, NormLayer
from siglane.config.vision import VisionConfig
from siglane.lm.qwen import QwenModel
from siglane.projector.mlp import Projector
from siglane.vision.tower import SiglipVisionModel

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
    write_json(folder / "vision_tower" / "preprocessor_config.json", _preprocessor_config())
    write_tensors(folder / "vision_tower", vision_tensors(model.tower))
    write_json(folder / "mm_projector" / "config.json", projector)
    write_tensors(folder / "mm_projector", projector_tensors(model.projector))


def vision_tensors(tower: SiglipVisionModel) -> Tensors:
    """Hub names. The block after the last one that is used passes its input on, so `hidden_states[-1] == [-2]`."""
    config = tower.config
    size = config.hidden_size
    embeddings = "vision_model.embeddings"
    weight = tower.patch_embedding.weight.unflatten(1, (config.num_channels, config.patch_size, config.patch_size))
    tensors = {
        f"{embeddings}.patch_embedding.weight": weight,
        f"{embeddings}.patch_embedding.bias": tower.patch_embedding.bias,
        f"{embeddings}.position_embedding.weight": tower.position_embedding.weight,
        "vision_model.post_layernorm.weight": torch.ones(size),
        "vision_model.post_layernorm.bias": torch.zeros(size),
    }
    for number in range(config.num_hidden_layers):
        prefix = f"vision_model.encoder.layers.{number}"
        if number < config.depth:
            block = tower.blocks[number].state_dict()
        else:
            block = {name: torch.zeros_like(value) for name, value in tower.blocks[0].state_dict().items()}
        for name, value in block.items():
            for part, tensor in _split_qkv(_VISION_NAMES, name, value, (size, size, size)):
                tensors[f"{prefix}.{part}"] = tensor
    return tensors


def language_tensors(model: QwenModel) -> Tensors:
    config = model.config
    kv = config.num_key_value_heads * config.head_dim
    tensors: Tensors = {"model.embed_tokens.weight": model.embed_tokens.weight, "model.norm.weight": model.norm.weight}
    for number, block in enumerate(model.blocks):
        for name, value in block.state_dict().items():
            if name == "mlp.gate_up.weight":
                parts = list(zip(("mlp.gate_proj.weight", "mlp.up_proj.weight"), value.chunk(2), strict=True))
            else:
                parts = _split_qkv(_LANGUAGE_NAMES, name, value, (config.num_attention_heads * config.head_dim, kv, kv))
            for part, tensor in parts:
                tensors[f"model.layers.{number}.{part}"] = tensor
    return tensors


def projector_tensors(projector: Projector) -> Tensors:
    tensors: Tensors = {}
    for number, layer in enumerate(projector.config.layers):
        if isinstance(layer, LinearLayer | NormLayer):
            for name, value in projector.layers[str(number)].state_dict().items():
                tensors[f"{layer.name}.{name}"] = value
    return tensors


# siglane's module -> the checkpoint's; a module named "qkv" becomes three
_VISION_NAMES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attention.qkv": "self_attn.{}_proj",
    "attention.out_proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_LANGUAGE_NAMES = {
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attention.qkv": "self_attn.{}_proj",
    "attention.o_proj": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mlp.down_proj": "mlp.down_proj",
}


def _split_qkv(
    names: dict[str, str], name: str, value: torch.Tensor, sizes: tuple[int, int, int]
) -> list[tuple[str, torch.Tensor]]:
    module, _, parameter = name.rpartition(".")
    renamed = names[module]
    if "{}" not in renamed:
        return [(f"{renamed}.{parameter}", value)]
    pieces = zip("qkv", value.split(sizes), strict=True)
    return [(f"{renamed.format(part)}.{parameter}", piece) for part, piece in pieces]


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


def _preprocessor_config() -> dict[str, Any]:
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": TILE, "width": TILE},
        "resample": 3,
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
