"""Tiny random checkpoints on disk, with the key names and config keys of the real ones. No network, a few thousand
parameters; every norm and bias is random, because defaults of one and zero hide mistakes.

Each `write_...` function returns the reference modules (transformers, torch) that hold the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

Layout = Literal["folders", "hf", "vila"]
State = dict[str, torch.Tensor]

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MEDIA = ("[BOS]", "[PAD]", "<vila/sentinel>", "<image>", "<vila/video>")
NOT_SPECIAL = ("<tool_call>", "</tool_call>")
SPLITTER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = (
    "You are a helpful assistant\n\nsystem\nuser\nassistant\n",
    "Describe the picture. What is in the image?\n\nThe image shows a cat and a dog.\n",
    "image image image tool call im start im end <image> <|im_end|>\n\n\n",
)


@dataclass
class Reference:
    """The modules behind a checkpoint. projector: VILA's nn.Sequential; language: transformers' Qwen2 or Qwen3, which
    carry no usable types. A plain tower has neither."""

    folder: Path
    tower: SiglipVisionModel
    projector: nn.Module | None = None
    language: Any = None
    tokenizer: PreTrainedTokenizerFast | None = None

    @property
    def side(self) -> int:
        """Pixels of a tile."""
        side = self.tower.config.image_size
        assert isinstance(side, int)
        return side

    @property
    def patches(self) -> int:
        """Patches along the side of a tile."""
        patch_size = self.tower.config.patch_size
        assert isinstance(patch_size, int)
        return self.side // patch_size

    def encode(self, text: str) -> list[int]:
        """Ids by the whole tokenizer, special tokens found in the text."""
        assert self.tokenizer is not None
        ids: list[int] = self.tokenizer(text).input_ids
        return ids

    def token(self, text: str) -> int:
        """The id of one token."""
        assert self.tokenizer is not None
        return self.tokenizer.get_vocab()[text]


def randomise(module: nn.Module, seed: int) -> None:
    """Every parameter random, norms around one, everything large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_norm else noise * (0.3 if parameter.ndim == 1 else 0.15))


def plain_backend() -> Tokenizer:
    """A byte-level BPE of 320 entries with Qwen2's splitter and no added token; "\\n\\n" is one of them."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    splitter = pre_tokenizers.Split(Regex(SPLITTER), behavior="isolated", invert=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [splitter, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS * 3, trainer)
    return backend


def build_tokenizer(added: tuple[str, ...] = (*MEDIA, *NOT_SPECIAL)) -> PreTrainedTokenizerFast:
    """`plain_backend` with SPECIAL behind its entries and `added` behind those."""
    backend = plain_backend()
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens([AddedToken(text, special=text not in NOT_SPECIAL, normalized=False) for text in added])
    return tokenizer


def write_nvila_checkpoint(
    folder: Path,
    *,
    layout: Layout = "folders",
    lite: bool = True,
    seed: int = 0,
    qwen3: bool = False,
    tied: bool = False,
    infix: bool = True,
    sharded: bool = False,
    image_size: int = 56,
    projector_type: str | None = None,
    chat_template: str | None = None,
    flags: Mapping[str, Any] | None = None,
    media_in_tokenizer: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Reference:
    """An NVILA-Lite (dynamic tiles, 3x3) or NVILA (dynamic_s2, 2x2) checkpoint.

    flags: keys to add to, or (None) to take from, the root config.json. infix: tower tensors are called
    `vision_model.`; the embedding table ends before the media tokens, as in NVILA-8B.
    """
    tokenizer = build_tokenizer() if media_in_tokenizer else build_tokenizer(())
    tokenizer.chat_template = chat_template
    tower = _tower(image_size, seed)
    language = _language(tokenizer.get_vocab()[SPECIAL[-1]] + 1, qwen3=qwen3, tied=tied, seed=seed + 1)
    scales = () if lite else (image_size, 2 * image_size, 3 * image_size)
    channels = tower.config.hidden_size * max(1, len(scales))
    kind = projector_type or ("mlp_downsample_3x3_fix" if lite else "mlp_downsample")
    projector = reference_projector(kind, channels, language.config.hidden_size)
    randomise(projector, seed + 2)
    preprocessor = {
        "image_processor_type": "SiglipImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 3, "rescale_factor": 1 / 255,
        "size": {"height": image_size, "width": image_size},
    }  # fmt: skip
    prefix = "vision_model." if infix else ""
    tower_state = {prefix + key.removeprefix("vision_model."): value for key, value in tower.state_dict().items()}
    states = {
        "llm": _cast(_language_state(language, tied), dtype),
        "vision_tower": _cast(tower_state, dtype),
        "mm_projector": _cast({f"layers.{key}": value for key, value in projector.state_dict().items()}, dtype),
    }  # fmt: skip
    root = _root_config(layout, lite, tower, language, kind, scales, tokenizer)
    root.update(flags or {})
    root = {key: value for key, value in root.items() if value is not None}
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", root)
    if layout == "folders":
        for part, state in states.items():
            (folder / part).mkdir(exist_ok=True)
            _write_weights(folder / part, state, sharded=sharded and part == "llm")
        _write_json(folder / "llm/config.json", _config(language))
        _write_json(folder / "vision_tower/config.json", _config(tower))
        _write_json(folder / "vision_tower/preprocessor_config.json", preprocessor)
        _write_json(folder / "mm_projector/config.json", {"model_type": "v2l_projector", "mm_projector_type": kind})
    else:
        merged = {f"{part}.{key}": value for part, state in states.items() for key, value in state.items()}
        _write_weights(folder, merged, sharded=sharded)
        _write_json(folder / "preprocessor_config.json", preprocessor)
    text_folder = folder / "llm" if layout == "folders" else folder
    tokenizer.save_pretrained(str(text_folder))
    _write_json(text_folder / "generation_config.json", {"eos_token_id": [tokenizer.eos_token_id]})
    return Reference(folder, tower, projector, language, tokenizer)


def write_siglip_checkpoint(
    folder: Path, *, full: bool = False, infix: bool = True, image_size: int = 56, seed: int = 0
) -> tuple[Reference, SiglipModel | None]:
    """A plain SigLIP tower; `full`: with a text tower beside it, as google/siglip-* are saved."""
    folder.mkdir(parents=True, exist_ok=True)
    vision = _vision_config(image_size)
    model = None
    if full:
        text = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        config = SiglipConfig(vision_config=vision.to_dict(), text_config=text)
        model = SiglipModel(config).eval()
        randomise(model, seed)
        state, raw = model.state_dict(), {**config.to_dict(), "model_type": "siglip"}
        tower = SiglipVisionModel(vision).eval()
        own = {key.removeprefix("vision_model."): v for key, v in state.items() if key.startswith("vision_model.")}
        tower.load_state_dict({_like(tower, key): value for key, value in own.items()})
    else:
        tower = _tower(image_size, seed)
        prefix = "vision_model." if infix else ""
        state = {prefix + key.removeprefix("vision_model."): value for key, value in tower.state_dict().items()}
        raw = _config(tower)
    _write_json(folder / "config.json", raw)
    _write_json(
        folder / "preprocessor_config.json", {"resample": 3, "size": {"height": image_size, "width": image_size}}
    )
    _write_weights(folder, {key: value.clone() for key, value in state.items()})
    return Reference(folder, tower), model


class Downsample(nn.Module):
    """VILA's block merge, written with loops: zeros below and right, channels in the order (row, column, channel)."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, channels = x.shape
        side, factor = round(tokens**0.5), self.factor
        blocks = -(-side // factor)
        padded = x.new_zeros(batch, blocks * factor, blocks * factor, channels)
        padded[:, :side, :side] = x.reshape(batch, side, side, channels)
        rows = []
        for row in range(blocks):
            for column in range(blocks):
                neighbours = [
                    padded[:, row * factor + dr, column * factor + dc] for dr in range(factor) for dc in range(factor)
                ]
                rows.append(torch.cat(neighbours, dim=-1))
        return torch.stack(rows, dim=1)


def reference_projector(kind: str, channels: int, width: int) -> nn.Sequential:
    """The nn.Sequential of VILA's base_projector.py for the types that released models use."""
    if kind == "mlp2x_gelu":
        return nn.Sequential(nn.Linear(channels, width), nn.GELU(), nn.Linear(width, width))
    if kind == "mlp_downsample":
        merged = 4 * channels
        return nn.Sequential(
            Downsample(2), nn.LayerNorm(merged), nn.Linear(merged, width), nn.GELU(), nn.Linear(width, width)
        )
    if kind == "mlp_downsample_3x3_fix":
        merged, middle = 9 * channels, 3 * channels
        return nn.Sequential(
            Downsample(3), nn.LayerNorm(merged), nn.Linear(merged, middle), nn.GELU(), nn.LayerNorm(middle),
            nn.Linear(middle, width), nn.GELU(), nn.Linear(width, width),
        )  # fmt: skip
    raise ValueError(kind)


def _vision_config(image_size: int) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=image_size,
        patch_size=14,
    )  # fmt: skip


def _tower(image_size: int, seed: int) -> SiglipVisionModel:
    tower = SiglipVisionModel(_vision_config(image_size)).eval()
    randomise(tower, seed)
    return tower


def _language(vocab_size: int, *, qwen3: bool, tied: bool, seed: int) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "tie_word_embeddings": tied, "rope_theta": 10000.0,
    }  # fmt: skip
    language: Any
    if qwen3:
        language = Qwen3ForCausalLM(Qwen3Config(head_dim=16, **sizes)).eval()
    else:
        language = Qwen2ForCausalLM(Qwen2Config(**sizes)).eval()
    randomise(language, seed)
    return language


def _language_state(language: nn.Module, tied: bool) -> State:
    """With tied weights the head is stored too, as some converters do."""
    state = dict(language.state_dict())
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    return state


def _root_config(
    layout: Layout,
    lite: bool,
    tower: SiglipVisionModel,
    language: nn.Module,
    kind: str,
    scales: tuple[int, ...],
    tokenizer: PreTrainedTokenizerFast,
) -> dict[str, Any]:
    channels = tower.config.hidden_size * max(1, len(scales))
    flags = {
        "mm_hidden_size": channels, "mm_vision_select_layer": -2, "mm_vision_select_feature": "cls_patch",
        "image_aspect_ratio": "dynamic" if lite else "dynamic_s2", "min_tiles": 1, "max_tiles": 12, "s2": False,
        "dynamic_s2": not lite,
    }  # fmt: skip
    if scales:
        flags |= {"s2_scales": ",".join(map(str, scales)), "s2_max_split_size": scales[0]}
        flags["s2_resize_output_to_scale_idx"] = -1
    ids = {
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<vila/video>"),
    }
    if layout == "folders":
        elsewhere = {"_name_or_path": "/somewhere/else"}
        parts = {"llm_cfg": elsewhere, "vision_tower_cfg": elsewhere, "mm_projector_cfg": elsewhere}
        return {"model_type": "llava_llama", "architectures": ["LlavaLlamaModel"], **parts, **flags}
    sections: dict[str, Any] = {"text_config": _config(language), "vision_config": _config(tower), **ids}
    if layout == "hf":
        name = "NVILALiteForConditionalGeneration" if lite else "NVILAForConditionalGeneration"
        return {"model_type": "nvila", "architectures": [name], **sections}
    sections |= {"mm_projector_type": kind, **flags}
    return {"model_type": "vila", "architectures": ["VILAForConditionalGeneration"], **sections}


def _config(module: nn.Module) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(module.config.to_json_string(use_diff=False))  # type: ignore[union-attr,operator]
    return config


def _like(tower: nn.Module, key: str) -> str:
    return key if key in tower.state_dict() else f"vision_model.{key}"


def _cast(state: State, dtype: torch.dtype) -> State:
    return {key: value.detach().to(dtype).clone() for key, value in state.items()}


def _write_weights(folder: Path, state: State, *, sharded: bool = False) -> None:
    if not sharded:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(state)
    half = len(names) // 2
    weight_map: dict[str, str] = {}
    for number, keys in enumerate((names[:half], names[half:]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({key: state[key] for key in keys}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(keys, file)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1))
