"""Tiny random SigLIP checkpoints with both towers: v1 (SentencePiece), SigLIP2 of fixed resolution and NaFlex (Gemma's
kind of tokenizer). Names of files, keys and tensors are the hub's."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, Literal

import torch
from checkpoints import config_of, preprocessor_of, randomise, write_checkpoint
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import Siglip2Config, Siglip2Model, SiglipConfig, SiglipModel, SiglipVisionModel

from siglane.verify.references.files import unset
from siglane.verify.references.siglip2 import resize_one_column_exactly

Kind = Literal["siglip", "siglip2", "naflex"]
TwoTowerReference = SiglipModel | Siglip2Model

LENGTH = 64
LOG_SCALE, BIAS = 4.0, -3.0  # trained ones are near 4.7 and -16, where the scores of random towers would all be 0
CORPUS = (
    "This is a photo of a cat. This is a photo of a dog! a cat, a dog and a bird",
    "two green shapes, one red square (and a yellow star); hello world",
    "snow_boots cafe-au-lait 12 34 photos of people at the beach, in the rain",
    "a picture of the old town hall at night: lights, streets, rivers & bridges",
)


def write_two_tower_checkpoint(
    folder: Path,
    kind: Kind = "siglip",
    *,
    image_size: int = 56,
    patch_size: int = 14,
    length: int = LENGTH,
    tokenizer: Literal["spiece", "json"] = "spiece",
    max_num_patches: int = 64,
    layers: int = 2,
    seed: int = 0,
    tower: SiglipVisionModel | None = None,
) -> TwoTowerReference:
    """Returns the reference with the same weights. tokenizer: which file a v1 checkpoint has; image_size, patch_size:
    of fixed resolution; max_num_patches: NaFlex' own (patches of 16, a learned grid of 4x4); tower: the image tower,
    with its head and of that resolution, in place of a new one."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 2,
    }  # fmt: skip
    vocab_size = _write_v1_tokenizer(folder, tokenizer) if kind == "siglip" else _write_gemma_tokenizer(folder)
    text = sizes | {
        "vocab_size": vocab_size, "max_position_embeddings": length, "projection_size": 32, "bos_token_id": 2,
        "eos_token_id": 1,
    }  # fmt: skip
    model: TwoTowerReference
    if kind == "naflex":
        vision = sizes | {"patch_size": 16, "num_patches": 16}
        model = unset(lambda: Siglip2Model(Siglip2Config(vision_config=vision, text_config=text)))
        resize_one_column_exactly(model.vision_model.embeddings)
        preprocessor = preprocessor_of("Siglip2ImageProcessor", 2, patch_size=16, max_num_patches=max_num_patches)
    else:
        vision = sizes | {"patch_size": patch_size, "image_size": image_size}
        if tower is not None:
            vision = tower.config.to_dict()
        model = unset(lambda: SiglipModel(SiglipConfig(vision_config=vision, text_config=text)))
        size = {"height": image_size, "width": image_size}
        preprocessor = preprocessor_of("SiglipImageProcessor", 3 if kind == "siglip" else 2, size=size)
    model.eval()
    randomise(model, seed)
    if tower is not None:
        model.vision_model.load_state_dict(tower.state_dict())
    with torch.no_grad():
        model.logit_scale.fill_(LOG_SCALE)
        model.logit_bias.fill_(BIAS)
    raw = config_of(model) | {"architectures": [type(model).__name__]}
    write_checkpoint(folder, raw, model.state_dict(), preprocessor=preprocessor)
    return model


def _write_v1_tokenizer(folder: Path, form: str) -> int:
    """T5's kind of SentencePiece: pad 0, eos 1, unk 2; the hub's tokenizer.json is the same unigram model."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([line.lower() for line in CORPUS * 4]), model_writer=written, model_type="unigram",
        vocab_size=120, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    processor = SentencePieceProcessor(model_proto=written.getvalue())
    stated: dict[str, Any] = {
        "tokenizer_class": "SiglipTokenizer", "do_lower_case": True, "model_max_length": 64, "eos_token": "</s>",
        "pad_token": "</s>", "unk_token": "<unk>", "model_input_names": ["input_ids"],
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    if form == "spiece":
        (folder / "spiece.model").write_bytes(written.getvalue())
    else:
        _unigram_of(processor).save(str(folder / "tokenizer.json"))
    size: int = processor.get_piece_size()
    return size


def _unigram_of(processor: Any) -> Tokenizer:
    pieces = [
        (processor.id_to_piece(number), processor.get_score(number)) for number in range(processor.get_piece_size())
    ]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"), ""),
            normalizers.NFKC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return backend


def _write_gemma_tokenizer(folder: Path) -> int:
    """Gemma's BPE with bytes to fall back on, as the conversion to SigLIP2 saves it: lower case, eos behind the text,
    padded on the right, no mask."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    size = 420
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    backend.train_from_iterator([line.lower() for line in CORPUS * 4], trainer)
    raw = json.loads(backend.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] in special]
    backend = Tokenizer.from_str(json.dumps(raw))
    backend.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    stated: dict[str, Any] = {
        "tokenizer_class": "GemmaTokenizer", "do_lower_case": True, "add_bos_token": False, "add_eos_token": True,
        "model_max_length": 64, "padding_side": "right", "model_input_names": ["input_ids"], "pad_token": "<pad>",
        "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    return size
