"""Language models alone: transformers' own, behind the tokenizer and its chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from siglane.verify.references.adapter import tensors_of
from siglane.verify.references.decoder import Decoder, load_tokenizer, rendered
from siglane.verify.references.files import classes_in, read_json
from siglane.verify.references.reference import ReferenceFamily
from siglane.verify.stages import Trace

ARCHITECTURES = {"Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "LlamaForCausalLM"}
MODEL_TYPES = ("qwen2", "qwen3", "qwen3_moe", "llama")


class CausalLm:
    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, adapter: Path | None = None) -> None:
        self.folder, self.tokenizer = folder, load_tokenizer(folder)
        self.decoder = Decoder.load(read_json(folder / "config.json"), tensors_of(folder, adapter), device, dtype)

    def run(self, pictures: Sequence[Image.Image], prompt: str, steps: int) -> Trace:
        text = rendered(self.folder, self.tokenizer, [], prompt, default="")
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return self.decoder.run(self.decoder.spliced(ids, []), steps)


def _matches(folder: Path) -> bool:
    config = read_json(folder / "config.json")
    named = classes_in(config)
    return not ARCHITECTURES.isdisjoint(named) if named else config.get("model_type") in MODEL_TYPES


FAMILY = ReferenceFamily(name="causal_lm", speaks=True, matches=_matches, load=CausalLm)
