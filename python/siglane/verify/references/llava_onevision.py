"""LLaVA-OneVision: transformers' own class, the pictures prepared on Pillow as its processor does (formats.md 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from siglane.verify.references.decoder import answer, load_tokenizer, rendered
from siglane.verify.references.files import Tensors, read_json, ready
from siglane.verify.references.pixels import Processing, patches_of, processor_json
from siglane.verify.references.reference import ReferenceFamily
from siglane.verify.references.tapping import tapping
from siglane.verify.stages import Trace

IMAGE = "<image>"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'image' %}"
    "<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


class LlavaOnevision:
    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        raw, processor = read_json(folder / "config.json"), processor_json(folder)
        config: Any = LlavaOnevisionConfig
        self.config: Any = config.from_dict(raw)
        self.device, self.dtype = device, dtype
        self.model: Any = LlavaOnevisionForConditionalGeneration(self.config)
        ready(self.model, _named(self.model, Tensors.of(folder)), device, dtype)
        self.processing = Processing.of(processor, 384, Image.Resampling.BICUBIC, mean=CLIP_MEAN, std=CLIP_STD)
        self.pinpoints: list[list[int]] = processor.get("image_grid_pinpoints", self.config.image_grid_pinpoints)
        self.folder, self.tokenizer = folder, load_tokenizer(folder, IMAGE)

    def run(self, pictures: Sequence[Image.Image], prompt: str, steps: int) -> Trace:
        alone = len(pictures) == 1
        pixels = self.prepared(pictures)
        inputs = {
            "pixel_values": (pixels[None] if alone else pixels[:, None]).to(self.device, self.dtype),
            "image_sizes": torch.tensor([(picture.height, picture.width) for picture in pictures]),
            "batch_num_images": torch.tensor([len(pictures)]),
        }
        with torch.no_grad():
            rows = self.model.get_image_features(**inputs, return_dict=True).pooler_output
        ids = torch.tensor([self._ids(prompt, [len(image) for image in rows])], device=self.device)
        with tapping(self._tower_modules()) as taps:
            spoken = answer(
                self.model, self.model.model.language_model.layers, {"input_ids": ids, **inputs}, steps
            )  # fmt: skip
        layer = self.config.vision_feature_layer
        used = layer if layer >= 0 else self.config.vision_config.num_hidden_layers + 1 + layer
        taps = {stage: rows for stage, rows in taps.items() if stage not in _unused(taps, used)}
        return {
            "preprocessing": patches_of(pixels.to(self.dtype), self.config.vision_config.patch_size),
            **taps,
            "features": taps[f"block.{used - 1}"],
            "projector": torch.cat(list(rows)).cpu(),
            **spoken,
        }

    def prepared(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """f32 `[tiles, 3, side, side]` of one request."""
        tiles = self._anyres(pictures[0]) if len(pictures) == 1 else [self._squared(picture) for picture in pictures]
        return torch.stack([self.processing.normalised(tile) for tile in tiles])

    def _tower_modules(self) -> dict[str, Any]:
        tower = self.model.model.vision_tower
        names = dict(tower.named_modules())
        inner = names.get("vision_model", tower)
        return {
            "patch_embedding": inner.embeddings.patch_embedding,
            "positions": inner.embeddings,
            **{f"block.{number}": layer for number, layer in enumerate(inner.encoder.layers)},
        }

    def _ids(self, prompt: str, rows: Sequence[int]) -> list[int]:
        text = rendered(self.folder, self.tokenizer, [IMAGE] * len(rows), prompt, TEMPLATE)
        image_id = self.tokenizer.convert_tokens_to_ids(IMAGE)
        counts = iter(rows)
        ids: list[int] = []
        for token in self.tokenizer(text).input_ids:
            ids += [self.config.image_token_id] * next(counts) if token == image_id else [token]
        return ids

    def _anyres(self, picture: Image.Image) -> list[Image.Image]:
        """The whole picture squashed, then the tiles of the pinpoint that shows most of it."""
        height, width = best_resolution(picture.height, picture.width, self.pinpoints)
        scale_w, scale_h = width / picture.width, height / picture.height
        if scale_w < scale_h:
            size = (width, min(math.ceil(picture.height * scale_w), height))
        else:
            size = (min(math.ceil(picture.width * scale_h), width), height)
        canvas = Image.new("RGB", (width, height))
        resized = picture.resize(size, self.processing.resample)
        canvas.paste(resized, ((width - size[0]) // 2, (height - size[1]) // 2))
        side = self.processing.height
        tiles = [canvas.crop((x, y, x + side, y + side)) for y in range(0, height, side) for x in range(0, width, side)]
        return [self.processing.resized(picture), *tiles]

    def _squared(self, picture: Image.Image) -> Image.Image:
        """One of several pictures: on a square of the mean colour."""
        longest = max(picture.size)
        red, green, blue = (int(value * 255) for value in self.processing.mean.tolist())
        canvas = Image.new("RGB", (longest, longest), (red, green, blue))
        canvas.paste(picture, ((longest - picture.width) // 2, (longest - picture.height) // 2))
        return self.processing.resized(canvas)


def best_resolution(height: int, width: int, pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """transformers' `select_best_resolution`: most effective pixels, then least waste, the first of equals."""
    best, most, least = (0, 0), 0, math.inf
    for candidate_height, candidate_width in pinpoints:
        scale = min(candidate_width / width, candidate_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        wasted = candidate_width * candidate_height - effective
        if effective > most or (effective == most and wasted < least):
            best, most, least = (candidate_height, candidate_width), effective, wasted
    return best


def _unused(taps: Trace, used: int) -> set[str]:
    return {stage for stage in taps if stage.startswith("block.") and int(stage.removeprefix("block.")) >= used}


def _named(model: Any, tensors: Tensors) -> Tensors:
    """The names of the class in memory -> those of the files, hub's or transformers 5's."""
    found = {}
    for name, _ in model.named_parameters():
        part, _, rest = name.removeprefix("model.").partition(".")
        bare = rest.removeprefix("vision_model.")
        candidates = {
            "vision_tower": (f"vision_tower.vision_model.{bare}", f"vision_tower.{bare}"),
            "language_model": (f"language_model.model.{rest}", f"language_model.{rest}"),
            "lm_head": ("language_model.lm_head.weight", "lm_head.weight"),
        }.get(part, (name.removeprefix("model."),))
        held = [f"{prefix}{one}" for one in candidates for prefix in ("", "model.") if f"{prefix}{one}" in tensors]
        found[name] = held[0] if held else candidates[0]
    return tensors.renamed(found)


FAMILY = ReferenceFamily(
    name="llava_onevision",
    speaks=True,
    matches=lambda folder: read_json(folder / "config.json").get("model_type") == "llava_onevision",
    load=LlavaOnevision,
)
