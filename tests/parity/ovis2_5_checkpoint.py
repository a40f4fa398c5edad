"""A tiny random Ovis2.5 checkpoint with the real one's keys and tensor names, and the modules that hold its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoints import build_tokenizer, randomise
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

PATCH, STRIDE = 4, 2
FACTOR = PATCH * STRIDE
Bounds = tuple[int, int]
SMALL: Bounds = (24 * 24, 64 * 64)
LARGE: Bounds = (112 * 112, 448 * 448)  # the reference's defaults for blocks of 8 instead of 32 pixels: same rows
INDICATORS = 4
THINKING = ("<think>", "</think>")


@dataclass
class OvisReference:
    """The modules behind a checkpoint. tower: transformers' blocks, wired by `ovis2_5_reference`; head: `head.0` and
    `head.1` of the visual tokenizer; vte: the visual vocabulary's table; bounds: fewest and most pixels; windows:
    patches along a window and the full blocks, None when all are full."""

    folder: Path
    tower: Any
    head: nn.Sequential
    vte: torch.Tensor
    language: Any
    tokenizer: PreTrainedTokenizerFast
    bounds: Bounds
    rope: bool
    windows: tuple[int, tuple[int, ...]] | None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def token(self, text: str) -> int:
        return self.tokenizer.get_vocab()[text]


def write_ovis2_5_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    tied: bool = False,
    head_stored: bool = True,
    rope: bool = True,
    windows: str | None = None,
    position_side: int = 6,
    visual_vocabulary: int = 52,
    thinking: bool = True,
    chat_template: str | None = None,
    architecture: bool = True,
    bounds: Bounds = SMALL,
    bounds_stated: bool = True,
    flags: Mapping[str, Any] | None = None,
    vit_flags: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> OvisReference:
    """head_stored: whether a tied model's file holds `llm.lm_head.weight` too; windows: `fullatt_block_indexes`, of
    windows of 4 x 4 patches; bounds_stated: whether preprocessor_config.json has them, which no released one has;
    flags, vit_flags: keys to add to, or (None) to take from, config.json and its vit_config."""
    tokenizer = _tokenizer(thinking, chat_template)
    tower = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, patch_size=PATCH,
            image_size=position_side * PATCH, vision_use_head=False,
        )
    ).eval()  # fmt: skip
    language: Any = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer) + 7, hidden_size=48, intermediate_size=56, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=8192,
            tie_word_embeddings=tied, rope_theta=1e6,
        )
    ).eval()  # fmt: skip
    words = visual_vocabulary - INDICATORS
    head = nn.Sequential(nn.Linear(32 * STRIDE**2, words, bias=False), nn.LayerNorm(words))
    for number, module in enumerate((tower, language, head)):
        randomise(module, seed + number)
    vte = torch.randn(visual_vocabulary, 48, generator=torch.Generator().manual_seed(seed + 9))
    vte[words:] = torch.tensor([[3.0], [-3.0], [5.0], [-5.0]])  # distinct constants: an exchanged indicator shows

    state = {f"visual_tokenizer.vit.vision_model.{_bare(key)}": value for key, value in tower.state_dict().items()}
    state |= {f"visual_tokenizer.head.{key}": value for key, value in head.state_dict().items()}
    state |= {f"llm.{key}": value for key, value in language.state_dict().items() if key != "lm_head.weight"}
    if head_stored:
        state["llm.lm_head.weight"] = language.lm_head.weight
    state["vte.weight"] = vte
    folder.mkdir(parents=True, exist_ok=True)
    stored = {key: value.detach().to(dtype).clone() for key, value in state.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    vit = _merged(_vit_config(tower, rope, windows, position_side), vit_flags)
    root = _merged(_root_config(language, vit, visual_vocabulary, architecture), flags)
    _write(folder / "config.json", root)
    end, pad = tokenizer.get_vocab()["<|im_end|>"], tokenizer.get_vocab()["<|endoftext|>"]
    _write(folder / "generation_config.json", {"eos_token_id": [end, pad], "pad_token_id": pad, "temperature": 0.6})
    _write(folder / "preprocessor_config.json", _preprocessor_config(bounds if bounds_stated else None))
    tokenizer.save_pretrained(str(folder))
    full = tuple(int(number) for number in (windows or "").split("|") if number)
    return OvisReference(folder, tower, head, vte, language, tokenizer, bounds, rope, (4, full) if windows else None)


def _tokenizer(thinking: bool, chat_template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer(())
    if thinking:  # not special in Qwen3's tokenizer either
        tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in THINKING])
    tokenizer.chat_template = chat_template
    return tokenizer


def _bare(key: str) -> str:
    return key.removeprefix("vision_model.")


def _vit_config(tower: Any, rope: bool, windows: str | None, position_side: int) -> dict[str, Any]:
    return {
        "_name_or_path": "google/siglip2-so400m-patch16-512", "attention_dropout": 0.0,
        "fullatt_block_indexes": windows, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 32,
        "hidden_stride": STRIDE, "image_size": position_side * PATCH, "intermediate_size": 40, "layer_norm_eps": 1e-6,
        "model_type": "siglip2_navit", "num_attention_heads": 2, "num_channels": 3, "num_hidden_layers": 3,
        "num_patches": -1, "patch_size": PATCH, "preserve_original_pe": True, "temporal_patch_size": 1,
        "torch_dtype": "float32", "use_rope": rope, "window_size": 18,
    }  # fmt: skip


def _root_config(language: Any, vit: Mapping[str, Any], rows: int, architecture: bool) -> dict[str, Any]:
    text = json.loads(language.config.to_json_string(use_diff=False))
    return {
        **({"architectures": ["Ovis2_5"]} if architecture else {}),
        "auto_map": {"AutoConfig": "configuration_ovis2_5.Ovis2_5_Config"},
        "conversation_formatter_class": "Qwen3ConversationFormatter",
        "hidden_size": 48, "llm_config": text, "max_position_embeddings": 8192,
        "model_type": "ovis2_5" if architecture else "ovis", "num_attention_heads": 4, "torch_dtype": "bfloat16",
        "visual_vocab_size": rows, "vit_config": dict(vit), "vocab_size": text["vocab_size"],
    }  # fmt: skip


def _preprocessor_config(bounds: Bounds | None) -> dict[str, Any]:
    return {
        "do_center_crop": False, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 2, "rescale_factor": 1 / 255,
        "image_processor_type": "SiglipImageProcessor", "size": {"height": 512, "width": 512},
        **({"min_pixels": bounds[0], "max_pixels": bounds[1]} if bounds else {}),
    }  # fmt: skip


def _merged(config: dict[str, Any], flags: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (config | dict(flags or {})).items() if value is not None}


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1))
