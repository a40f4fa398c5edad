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
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn

from siglane.config.reader import ConfigReader, RawConfig, read_json
from siglane.errors import ConfigError
from siglane.families.processor import ImageProcessor
from siglane.families.two_tower import (
    BOTH_TOWERS,
    TOKENIZER_CONFIG,
    LoadedTwoTower,
    TwoTowerModel,
    read_two_tower,
    two_tower_plan,
)
from siglane.training.initialise import initialise
from siglane.weights.export import checkpoint_tensors
from siglane.weights.hub import Checkpoint
from siglane.weights.load import SINGLE, allocate

CONFIG, PREPROCESSOR, TOKENIZER = "config.json", "preprocessor_config.json", "tokenizer.json"
TOKENIZER_FILES = (TOKENIZER, TOKENIZER_CONFIG, "spiece.model", "special_tokens_map.json", "added_tokens.json")
TOKEN_DEVIATION = 0.3  # of fresh token tables: texts must be told apart before anything can be learned from them
PAD, END, UNKNOWN = "<pad>", "<eos>", "<unk>"  # SigLIP2's, ids 0, 1 and 3 there; here <unk> is 2


def copy_files(source: Checkpoint, folder: Path) -> None:
    """What describes the model of `source`, without its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, PREPROCESSOR, *TOKENIZER_FILES):
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
    if not (folder / PREPROCESSOR).exists():
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
    """A byte-level BPE in lower case with SigLIP2's special tokens, of at most `vocab_size` ids: any text has some.

    ConfigError when there is no room for the 256 bytes.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [PAD, END, UNKNOWN]
    if vocab_size < len(alphabet) + len(special):
        raise ConfigError(f"vocab_size {vocab_size} is too small; a tokenizer made here has at least 259 ids")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    # one space in front, so that a word is the same token wherever it stands
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, length: int) -> None:
    """As siglane and `PreTrainedTokenizerFast` read it; length: of every text, padding included."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / TOKENIZER))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": END,
        "unk_token": UNKNOWN,
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
