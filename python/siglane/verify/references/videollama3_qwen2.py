"""VideoLLaMA3 in its authors' layout: transformers' tower, the sizes of the authors' own processor (formats.md 12)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from siglane.verify.references.files import Raw, classes_in, read_json
from siglane.verify.references.pixels import CLIP_MEAN, CLIP_STD
from siglane.verify.references.reference import ReferenceFamily
from siglane.verify.references.video_llama_3 import Medium, VideoLlama3

VISION = "vision_encoder_config"
OTHERS = (VISION, "vision_encoder", "mm_projector_type", "use_token_compression", "image_token_index", "auto_map")


class VideoLlama3Qwen2(VideoLlama3):
    image, mean, std = "<image>", CLIP_MEAN, CLIP_STD

    def vision_key(self) -> str:
        return VISION

    def of_language(self) -> Raw:
        return {key: value for key, value in self.raw.items() if key not in OTHERS} | {"model_type": "qwen2"}

    def placeholder(self) -> str:
        return self.image

    def merges(self) -> tuple[int, int]:
        processor = read_json(self.folder / "processor_config.json")
        return processor.get("image_merge_size", 1), processor.get("video_merge_size", 2)

    def compresses(self) -> bool:
        return bool(self.raw.get("use_token_compression", True))

    def sizes(self, media: Sequence[Medium]) -> list[tuple[int, int]]:
        """`simple_batched_resize` for pictures or videos alone, `batched_resize` for both."""
        shown = [(1, medium) if isinstance(medium, Image.Image) else (len(medium), medium[0]) for medium in media]
        sides = [(count, first.height, first.width) for count, first in shown]
        merges = [self.merges()[not isinstance(medium, Image.Image)] for medium in media]
        factors = [self.vision_config.patch_size * merge for merge in merges]
        least, most = self.picture.get("min_tokens", 16), self.picture.get("max_tokens", 16384)
        if len(set(factors)) == 1:
            budget = most * factors[0] ** 2 // sum(count for count, _, _ in sides)
            return [_alone(high, wide, factors[0], least, budget) for _, high, wide in sides]
        rows = sum(t * math.ceil(h / f) * math.ceil(w / f) for (t, h, w), f in zip(sides, factors, strict=True))
        if rows <= most:
            return [(round(h / f) * f, round(w / f) * f) for (_, h, w), f in zip(sides, factors, strict=True)]
        beta = math.sqrt(rows / most)
        return [
            (math.floor(h / beta / f) * f, math.floor(w / beta / f) * f)
            for (_, h, w), f in zip(sides, factors, strict=True)
        ]


def _alone(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    high, wide = round(height / factor) * factor, round(width / factor) * factor
    if high * wide > most:
        beta = math.sqrt((height * width) / most)
        high, wide = math.floor(height / beta / factor) * factor, math.floor(width / beta / factor) * factor
    if high * wide < least * factor**2:
        beta = math.sqrt(least * factor**2 / (height * width))
        high, wide = math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return high, wide


def _matches(folder: Path) -> bool:
    raw = read_json(folder / "config.json")
    return raw.get("model_type") == "videollama3_qwen2" or "Videollama3Qwen2ForCausalLM" in classes_in(raw)


FAMILY = ReferenceFamily(name="videollama3_qwen2", speaks=True, matches=_matches, load=VideoLlama3Qwen2)
