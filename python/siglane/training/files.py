"""The folder of a contrastive model in training: a whole checkpoint but for its weights, which every save replaces.

It is copied from the model that training starts from, or written around a configuration: transformers' `SiglipModel` or
`Siglip2Model` and siglane's `load_two_tower` read it alike.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn

from siglane.config.reader import ConfigReader, RawConfig, read_json
from siglane.errors import ConfigError
from siglane.families.processor import ImageProcessor
from siglane.families.stated import (
    CONFIG,
    DESCRIBED,
    PREPROCESSOR,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    image_processor,
)
from siglane.families.two_tower import BOTH_TOWERS, LoadedTwoTower, TwoTowerModel, read_two_tower, two_tower_plan
from siglane.training.initialise import initialise
from siglane.weights.export import checkpoint_tensors
from siglane.weights.files import SINGLE
from siglane.weights.hub import Checkpoint
from siglane.weights.load import allocate

TOKEN_DEVIATION = 0.3  # of fresh token tables: texts must be told apart before anything can be learned from them
SPECIAL = {
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = "▁"  # SentencePiece's


def copy_files(source: Checkpoint, folder: Path) -> None:
    """What describes the model of `source`, without its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*DESCRIBED, *TOKENIZER_FILES):
        if source.has(name):
            shutil.copyfile(source.path(name), folder / name)


def write_files(config: Path, captions: Iterable[str], folder: Path) -> None:
    """A folder for the `SiglipConfig` or `Siglip2Config` in file `config`.

    Preprocessor and tokenizer that lie beside the file are taken; without them pictures are scaled to -1..1 as SigLIP's
    are, and a tokenizer is made of the captions. ConfigError for another model's configuration.
    """
    raw = read_json(config)
    reader = ConfigReader(raw, str(config))
    reader.choice("model_type", dict.fromkeys(BOTH_TOWERS))
    copy_files(Checkpoint(config.parent), folder)
    write_json(folder / CONFIG, raw)
    if image_processor(Checkpoint(folder)) is None:
        write_json(folder / PREPROCESSOR, _preprocessor(reader))
    if not any((folder / name).exists() for name in (TOKENIZER, "spiece.model")):
        text = reader.section("text_config")
        tokenizer = caption_tokenizer(captions, text.size("vocab_size", 32000))
        write_tokenizer(tokenizer, folder, text.size("max_position_embeddings", 64))


def _preprocessor(config: ConfigReader) -> RawConfig:
    common = {
        "do_convert_rgb": True, "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    vision = config.section("vision_config")
    if config.value("model_type", str) == "siglip2":
        patches = {"patch_size": vision.size("patch_size", 16), "max_num_patches": vision.size("num_patches", 256)}
        return {"image_processor_type": "Siglip2ImageProcessor", "resample": 2} | common | patches
    side = vision.size("image_size", 224)
    size = {"size": {"height": side, "width": side}}
    return {"image_processor_type": "SiglipImageProcessor", "resample": 3} | common | size


def caption_tokenizer(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """SigLIP2's kind of tokenizer, of at most `vocab_size` ids: lower case, BPE within words, bytes for the rest, so
    that any text has ids.

    Everything in it follows from vocabulary and merges as in transformers' `Siglip2Tokenizer`, which since 5.20 reads
    only those of a SigLIP2's tokenizer.json. ConfigError when there is no room for the 256 bytes.
    """
    held = [*SPECIAL.values(), *BYTES]
    if vocab_size < len(held):
        raise ConfigError(f"vocab_size {vocab_size} is too small; a tokenizer made here has at least {len(held)} ids")
    trained = Tokenizer(models.BPE())
    lower = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", SPACE)])
    trained.normalizer = lower
    trained.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    room = vocab_size - len(held)
    trainer = trainers.BpeTrainer(vocab_size=room, limit_alphabet=room, show_progress=False)
    if room:
        trained.train_from_iterator(captions, trainer)
    found = json.loads(trained.to_str())["model"]
    pieces = [*held, *sorted(set(found["vocab"]) - set(held), key=found["vocab"].__getitem__)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=[(left, right) for left, right in found["merges"]],
            unk_token=SPECIAL["unk_token"],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL.values()])
    tokenizer.normalizer = lower
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    end = SPECIAL["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, pieces.index(end))]
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, length: int) -> None:
    """As siglane and transformers' `AutoTokenizer` read it; length: of every text, padding included."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / TOKENIZER))
    config = {
        "tokenizer_class": "Siglip2Tokenizer",
        **SPECIAL,
        "padding_side": "right",
        "model_max_length": length,
        "model_input_names": ["input_ids"],
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / TOKENIZER_CONFIG, config)


def start_weights(model: TwoTowerModel, fresh: nn.Module, log_scale: float, bias: float) -> None:
    """Fresh weights for `fresh`, the model or a part of it; log_scale: t', the logarithm of the scale."""
    initialise(fresh)
    nn.init.normal_(model.text.token_embedding.weight, std=TOKEN_DEVIATION)
    nn.init.constant_(model.logit_scale, log_scale)
    nn.init.constant_(model.logit_bias, bias)


def write_weights(model: TwoTowerModel, folder: Path, dtype: torch.dtype) -> None:
    """An interruption leaves the old file or the new one."""
    scalars = ("logit_scale", "logit_bias")  # in half precision a logit would be wrong by tenths
    stored = {
        name: value.to("cpu", torch.float32 if name in scalars else dtype).contiguous()
        for name, value in checkpoint_tensors(model, two_tower_plan(model.config)).items()
    }
    part = folder / (SINGLE + ".part")
    part.write_bytes(save(stored, metadata={"format": "pt"}))
    os.replace(part, folder / SINGLE)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def fresh_two_tower(folder: Path, device: torch.device) -> LoadedTwoTower:
    """The model that `folder` describes, in float32, its parameters not yet filled."""
    config, texts = read_two_tower(Checkpoint(folder))
    with torch.device("meta"):
        model = TwoTowerModel(config)
    allocate(model, device, torch.float32)
    return LoadedTwoTower(model, ImageProcessor(config.images), texts)
