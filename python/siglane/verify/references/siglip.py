"""SigLIP, and SigLIP2 of fixed resolution: transformers' SiglipVisionModel with its pooling head (formats.md 1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from siglane.verify.references.adapter import tensors_of
from siglane.verify.references.files import processor_json, read_json
from siglane.verify.references.pixels import siglip_processing
from siglane.verify.references.reference import ReferenceFamily
from siglane.verify.references.tower import SiglipTower
from siglane.verify.stages import Trace


class Siglip:
    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, adapter: Path | None = None) -> None:
        root = read_json(folder / "config.json")
        raw = root["vision_config"] if root["model_type"] == "siglip" else root
        self.tower = SiglipTower(raw, tensors_of(folder, adapter), device, dtype, head=True)
        self.processing = siglip_processing(processor_json(folder), self.tower.side)

    def run(self, pictures: Sequence[Image.Image], prompt: str, steps: int) -> Trace:
        resized = [self.processing.resized(picture) for picture in pictures]
        taps = self.tower.run(torch.stack([self.processing.normalised(picture) for picture in resized]))
        taps["features"] = taps.pop("post_layernorm")
        return taps


FAMILY = ReferenceFamily(
    name="siglip",
    speaks=False,
    matches=lambda folder: read_json(folder / "config.json").get("model_type") in ("siglip", "siglip_vision_model"),
    load=Siglip,
)
