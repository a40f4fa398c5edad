"""Tiny random checkpoints on disk, with the key names and config keys of the real ones. No network, a few thousand
parameters; every norm and bias is random, because defaults of one and zero hide mistakes.

Each `write_...` function returns the modules (transformers, torch) whose weights it stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from siglane.verify.references.files import unset
from siglane.verify.references.nvila import build_projector

PreTrainedConfig.__repr__ = object.__repr__  # an eighth of parity's time: transformers formats it for logs that are off

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
class Written:
    """The modules behind a checkpoint. language: transformers' decoder, which carries no usable types. A plain tower
    has the tower only."""

    folder: Path
    tower: SiglipVisionModel
    projector: nn.Module | None = None
    language: Any = None
    tokenizer: PreTrainedTokenizerFast | None = None

    def encode(self, text: str) -> list[int]:
        """Ids by the whole tokenizer, special tokens found in the text."""
        ids: list[int] = self.tokenizer(text).input_ids
        return ids

    def token(self, text: str) -> int:
        """The id of one token."""
        return self.tokenizer.get_vocab()[text]


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    tensors: State,
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    preprocessor: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    sharded: bool = False,
) -> None:
    """The files of a checkpoint; those that are not given are not written. dtype: tensors are cast to it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in (("config", config), ("preprocessor_config", preprocessor), ("generation_config", generation)):
        if values is not None:
            write_json(folder / f"{name}.json", values)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    # safetensors wants tensors that share no memory
    state = {name: tensor.detach().to(dtype or tensor.dtype).contiguous().clone() for name, tensor in tensors.items()}
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
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1))


def merged(config: Mapping[str, Any], flags: Mapping[str, Any] | None) -> dict[str, Any]:
    """`config` with keys added, or (None) taken out."""
    return {key: value for key, value in {**config, **(flags or {})}.items() if value is not None}


def config_of(module: nn.Module) -> dict[str, Any]:
    """Every key of its class, as on the hub."""
    config: dict[str, Any] = json.loads(module.config.to_json_string(use_diff=False))
    return config


def preprocessor_of(kind: str, resample: int, **facts: Any) -> dict[str, Any]:
    """preprocessor_config.json of SigLIP's image processors."""
    return {
        "image_processor_type": kind, "do_resize": True, "do_rescale": True, "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": resample, "rescale_factor": 1 / 255,
        **facts,
    }  # fmt: skip


def tower_of(seed: int, **facts: Any) -> SiglipVisionModel:
    """facts: of SiglipVisionConfig."""
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}
    tower: SiglipVisionModel = unset(lambda: SiglipVisionModel(SiglipVisionConfig(**sizes | facts))).eval()
    randomise(tower, seed)
    return tower


# sizes that decoders of every kind have instead of their own
instead: dict[str, int] = {}


@contextmanager
def large_heads() -> Iterator[None]:
    """Decoders that are written meanwhile have heads of 32 channels, the smallest that vLLM has kernels for on CPUs."""
    instead.update(hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    try:
        yield
    finally:
        instead.clear()


def decoder_of(kind: str, seed: int, **facts: Any) -> Any:
    """kind: a model_type of transformers; facts: of its configuration."""
    sizes = {
        "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **sizes | facts | instead)
    decoder: Any = unset(lambda: AutoModelForCausalLM.from_config(config)).eval()
    randomise(decoder, seed)
    return decoder


def saved_experts(state: State) -> State:
    """Tensors of transformers' class in memory, experts stacked, under the names that it saves: one for each expert."""
    found: State = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".experts.")
        halves = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(kind, ())
        if not layer or not halves:
            found[name] = tensor
            continue
        for number, expert in enumerate(tensor):
            for half, part in zip(halves, expert.chunk(len(halves)), strict=True):
                found[f"{layer}.experts.{number}.{half}.weight"] = part
    return found


def randomise(module: nn.Module, seed: int, *, by_width: bool = False) -> None:
    """Every parameter random, norms around one, everything large enough to matter. by_width: no layer is louder than
    its input, however wide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * (parameter[0].numel() ** -0.5 if by_width else 0.15))
            else:
                parameter.copy_(1 + 0.3 * noise if name.endswith("weight") else 0.3 * noise)


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
) -> Written:
    """An NVILA-Lite (dynamic tiles, 3x3) or NVILA (dynamic_s2, 2x2) checkpoint.

    flags: keys to add to, or (None) to take from, the root config.json. infix: tower tensors are called
    `vision_model.`; the embedding table ends before the media tokens, as in NVILA-8B.
    """
    tokenizer = build_tokenizer() if media_in_tokenizer else build_tokenizer(())
    tokenizer.chat_template = chat_template
    tower = tower_of(seed, image_size=image_size, patch_size=14)
    language = decoder_of(
        "qwen3" if qwen3 else "qwen2", seed + 1, vocab_size=tokenizer.get_vocab()[SPECIAL[-1]] + 1,
        max_position_embeddings=4096, tie_word_embeddings=tied, rope_theta=10000.0, **{"head_dim": 16} if qwen3 else {},
    )  # fmt: skip
    scales = () if lite else (image_size, 2 * image_size, 3 * image_size)
    channels = tower.config.hidden_size * max(1, len(scales))
    kind = projector_type or ("mlp_downsample_3x3_fix" if lite else "mlp_downsample")
    projector = build_projector(kind, channels, language.config.hidden_size)
    randomise(projector, seed + 2)
    states = {
        "llm": dict(language.state_dict()),  # with tied weights the head is stored too, as some converters do
        "vision_tower": {("vision_model." if infix else "") + key: value for key, value in tower.state_dict().items()},
        "mm_projector": {f"layers.{key}": value for key, value in projector.state_dict().items()},
    }  # fmt: skip
    size = {"height": image_size, "width": image_size}
    preprocessor = preprocessor_of("SiglipImageProcessor", 3, size=size)
    generation = {"eos_token_id": [tokenizer.eos_token_id]}
    root = merged(_root_config(layout, lite, tower, language, kind, scales, tokenizer), flags)
    if layout == "folders":
        parts: dict[str, dict[str, Any]] = {
            "llm": {
                "config": config_of(language), "tokenizer": tokenizer, "generation": generation, "sharded": sharded,
            },
            "vision_tower": {"config": config_of(tower), "preprocessor": preprocessor},
            "mm_projector": {"config": {"model_type": "v2l_projector", "mm_projector_type": kind}},
        }  # fmt: skip
        for part, files in parts.items():
            write_checkpoint(folder / part, tensors=states[part], dtype=dtype, **files)
        write_json(folder / "config.json", root)
    else:
        whole = {f"{part}.{key}": value for part, state in states.items() for key, value in state.items()}
        write_checkpoint(
            folder, root, whole, tokenizer, preprocessor=preprocessor, generation=generation, dtype=dtype,
            sharded=sharded,
        )  # fmt: skip
    return Written(folder, tower, projector, language, tokenizer)


def write_siglip_checkpoint(
    folder: Path, *, full: bool = False, infix: bool = True, image_size: int = 56, seed: int = 0
) -> Written:
    """A plain SigLIP tower; `full`: with a text tower beside it, as google/siglip-* are saved."""
    tower = tower_of(seed, image_size=image_size, patch_size=14)
    state = {("vision_model." if infix else "") + key: value for key, value in tower.state_dict().items()}
    raw = config_of(tower)
    if full:
        text = {
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }  # fmt: skip
        model = unset(lambda: SiglipModel(SiglipConfig(vision_config=tower.config.to_dict(), text_config=text)))
        randomise(model, seed + 1)
        model.vision_model.load_state_dict(tower.state_dict())
        state, raw = model.state_dict(), {**model.config.to_dict(), "model_type": "siglip"}
    preprocessor = {"resample": 3, "size": {"height": image_size, "width": image_size}}
    write_checkpoint(folder, raw, state, preprocessor=preprocessor)
    return Written(folder, tower)


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
    sections: dict[str, Any] = {"text_config": config_of(language), "vision_config": config_of(tower), **ids}
    if layout == "hf":
        name = "NVILALiteForConditionalGeneration" if lite else "NVILAForConditionalGeneration"
        return {"model_type": "nvila", "architectures": [name], **sections}
    sections |= {"mm_projector_type": kind, **flags}
    return {"model_type": "vila", "architectures": ["VILAForConditionalGeneration"], **sections}
