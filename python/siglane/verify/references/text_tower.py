"""The text tower of a SigLIP with both: transformers' SiglipTextModel and Siglip2TextModel, and the ids that SigLIP and
SigLIP2 were trained on (formats.md 1.3, 1.6, 2.1)."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import Siglip2TextConfig, Siglip2TextModel, SiglipTextConfig, SiglipTextModel, SiglipTokenizer

from siglane.verify.references.adapter import tensors_of
from siglane.verify.references.files import read_json, ready, unset
from siglane.verify.references.tapping import tapping
from siglane.verify.stages import Trace

CLASSES: dict[str, tuple[Any, Any]] = {
    "siglip": (SiglipTextConfig, SiglipTextModel),
    "siglip2": (Siglip2TextConfig, Siglip2TextModel),
}
TOKENIZERS = ("tokenizer.json", "spiece.model")
PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]")
PAD_OF_END = {"</s>": "</s>", "<eos>": "<pad>"}  # SigLIP's and SigLIP2's, where no file states another


class TextTower:
    """The text half of a two-tower checkpoint, with its temperature and bias."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, adapter: Path | None = None) -> None:
        root, tensors = read_json(folder / "config.json"), tensors_of(folder, adapter)
        config, model = CLASSES[root["model_type"]]
        self.config: Any = config.from_dict(root.get("text_config") or {})
        self.folder, self.device = folder, device
        self.model: Any = unset(lambda: model(self.config))
        ready(self.model, tensors.under("text_model."), device, dtype)
        self.calibration = {
            "calibration.0": tensors["logit_scale"].float().exp().reshape(1, 1),
            "calibration.1": tensors["logit_bias"].float().reshape(1, 1),
        }

    def read(self, texts: Sequence[str]) -> Trace:
        """text.ids `[texts, length]`, text.embedding, text.block.N, text.pooled, and calibration."""
        ids = self.ids(texts)
        layers = {f"text.block.{number}": layer for number, layer in enumerate(self.model.encoder.layers)}
        with tapping({"text.embedding": self.model.embeddings.token_embedding, **layers}) as taps:
            pooled = self.model(input_ids=ids.to(self.device)).pooler_output
        return {"text.ids": ids, **taps, "text.pooled": pooled.cpu(), **self.calibration}

    def ids(self, texts: Sequence[str]) -> torch.Tensor:
        """i64 `[texts, length]`, cut and padded."""
        length = self.config.max_position_embeddings
        if not (self.folder / "tokenizer.json").is_file():
            found = SiglipTokenizer.from_pretrained(str(self.folder))
            options: dict[str, Any] = {"padding": "max_length", "max_length": length, "truncation": True}
            return torch.tensor(found(list(texts), **options).input_ids)
        backend = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        backend.no_padding()
        backend.no_truncation()
        end = backend.id_to_token(1) or ""
        stated = read_json(self.folder / "tokenizer_config.json").get("pad_token")
        stated = stated.get("content") if isinstance(stated, dict) else stated
        pad = backend.token_to_id(stated or PAD_OF_END[end])
        rows = [backend.encode(_canonical(text, end), add_special_tokens=False).ids[: length - 1] for text in texts]
        return torch.tensor([[*row, 1, *[pad] * (length - 1 - len(row))] for row in rows])


def _canonical(text: str, end: str) -> str:
    """SigLIP reads lower case without punctuation, SigLIP2 lower case."""
    return " ".join(PUNCTUATION.sub("", text.lower()).split()) if end == "</s>" else text.lower()


def load_text_tower(
    folder: Path, device: torch.device, dtype: torch.dtype, adapter: Path | None = None
) -> TextTower | None:
    """None for a checkpoint without one, or without a tokenizer, whose texts nobody can read. ConfigError or
    WeightError as a reference's."""
    if read_json(folder / "config.json").get("model_type") not in CLASSES:
        return None
    if not any((folder / name).is_file() for name in TOKENIZERS):
        return None
    if not any(name.startswith("text_model.") for name in tensors_of(folder, adapter).readers):
        return None
    return TextTower(folder, device, dtype, adapter)
