"""Idefics3 and SmolVLM: transformers' own classes, the pictures prepared on Pillow as their processors do (formats.md
11)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from siglane.verify.references.adapter import tensors_of
from siglane.verify.references.decoder import PLACE, Decoder, load_tokenizer, rendered
from siglane.verify.references.files import Raw, Tensors, media_token, processor_json, read_json, ready, unset
from siglane.verify.references.pixels import Processing, patches_of, squares_of
from siglane.verify.references.reference import ReferenceFamily, Seen, VisionLanguageReference
from siglane.verify.references.tapping import tapping
from siglane.verify.references.tower import stages_of
from siglane.verify.stages import Trace

CLASSES: dict[str, tuple[Any, Any]] = {
    "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
}
TABLE, HEAD = "model.text_model.embed_tokens.weight", "lm_head.weight"
MOST_PIXELS = 4096
TEMPLATE = (
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}:{{ '' if m.content[0].type == 'image' else ' ' }}"
    "{% for part in m.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{{ 'Assistant:' }}"
)


class Idefics3(VisionLanguageReference):
    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, adapter: Path | None = None) -> None:
        raw, self.picture = read_json(folder / "config.json"), processor_json(folder)
        config, model = CLASSES[raw["model_type"]]
        self.config: Any = config.from_dict(raw)
        self.device, self.dtype = device, dtype
        tensors = tensors_of(folder, adapter)
        if TABLE in tensors and HEAD in tensors and not torch.equal(tensors[TABLE], tensors[HEAD]):
            self.config.tie_word_embeddings = False  # then each is used
        self.model: Any = unset(lambda: model(self.config))
        ready(self.model, _named(self.model, tensors), device, dtype)
        self.tower: Any = self.model.model.vision_model
        if dtype != torch.float32:
            self.tower.embeddings.register_forward_hook(_exact_positions, with_kwargs=True)
        self.language = Decoder(self.model, self.model.model.text_model.layers)
        side = self._edge("max_image_size", 364)
        self.processing = Processing.of({**self.picture, "size": side}, side, Image.Resampling.LANCZOS)
        self.folder, self.tokenizer = folder, load_tokenizer(folder)
        self.image = media_token(folder, "image_token", "<image>")

    def run(self, pictures: Sequence[Image.Image], prompt: str, steps: int) -> Trace:
        """transformers' class encodes and splices by itself, a second time."""
        if not pictures:
            return super().run(pictures, prompt, steps)
        seen = self.see(pictures)
        ids = torch.tensor([self.ids(self.text(prompt, seen), seen)], device=self.device)
        ids[ids == PLACE] = self.config.image_token_id
        pixels = self.prepared(pictures)[0][None].to(self.device, self.dtype)
        return {**seen.taps, **self.language.answer({"input_ids": ids, "pixel_values": pixels}, steps)}

    def see(self, pictures: Sequence[Image.Image]) -> Seen:
        pixels, grids = self.prepared(pictures)
        with tapping({**stages_of(self.tower), "features": self.tower.post_layernorm}) as taps:
            inputs = pixels[None].to(self.device, self.dtype)
            output = self.model.model.get_image_features(pixel_values=inputs, return_dict=True).pooler_output
        rows = torch.cat([tiles.flatten(0, -2) for tiles in output]).unflatten(0, (len(pixels), -1)).cpu()
        preprocessing = patches_of(pixels.to(self.dtype), self.config.vision_config.patch_size)
        counts = [down * across + 1 if down else 1 for down, across in grids]
        images = [list(tiles) for tiles in rows.split(counts)]
        return Seen({"preprocessing": preprocessing, **taps, "projector": rows.flatten(0, 1)}, images, grids)

    def text(self, prompt: str, seen: Seen) -> str:
        images = [self._expanded(*grid, len(seen.blocks[0])) for grid in seen.grids]
        return rendered(
            self.folder, self.tokenizer, images, prompt, TEMPLATE, by_processor=True, placeholder=self.image
        )

    def ids(self, text: str, seen: Seen) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return [PLACE if token == self.config.image_token_id else token for token in ids]

    def prepared(self, pictures: Sequence[Image.Image]) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """f32 `[tiles, 3, side, side]` of one request, and rows and columns of each picture's tiles, 0 and 0 of one
        that is not cut."""
        cut = [self._tiles(picture) for picture in pictures]
        pixels = torch.stack([self.processing.normalised(tile) for tiles, _ in cut for tile in tiles])
        return pixels, [grid for _, grid in cut]

    def _tiles(self, picture: Image.Image) -> tuple[list[Image.Image], tuple[int, int]]:
        side, resample = self.processing.width, self.processing.resample
        picture = picture.resize(_scaled(*picture.size, self._edge("size", 4 * 364)), resample)
        if not self.picture.get("do_image_splitting", True):
            return [self.processing.resized(picture)], (0, 0)
        picture = picture.resize(_whole_squares(*picture.size, side), resample)
        if picture.size == (side, side):
            return [picture], (0, 0)
        tiles = [*squares_of(picture, side), self.processing.resized(picture)]
        return tiles, (picture.height // side, picture.width // side)

    def _edge(self, key: str, default: int) -> int:
        found: Raw = self.picture.get(key) or {}
        return int(found.get("longest_edge", default))

    def _expanded(self, down: int, across: int, length: int) -> str:
        """`replace_image_token`."""
        fake = media_token(self.folder, "fake_image_token", "<fake_token_around_image>")
        whole = fake + media_token(self.folder, "global_image_token", "<global-img>") + self.image * length + fake
        if not down:
            return whole
        rows = [
            "".join(f"{fake}<row_{row + 1}_col_{column + 1}>{self.image * length}" for column in range(across)) + "\n"
            for row in range(down)
        ]
        return "".join(rows) + "\n" + whole


def _scaled(width: int, height: int, longest: int) -> tuple[int, int]:
    """`get_resize_output_image_size`."""
    ratio = width / height
    if width >= height:
        width, height = longest, int(longest / ratio)
        height += height % 2
    else:
        width, height = int(longest * ratio), longest
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    ratio = width / height
    if width >= height and width > MOST_PIXELS:
        width, height = MOST_PIXELS, int(MOST_PIXELS / ratio)
    elif height > width and height > MOST_PIXELS:
        width, height = int(MOST_PIXELS * ratio), MOST_PIXELS
    return max(width, 1), max(height, 1)


def _whole_squares(width: int, height: int, side: int) -> tuple[int, int]:
    """`resize_for_vision_encoder`."""

    def up(pixels: int) -> int:
        return math.ceil(pixels / side) * side

    ratio = width / height
    if width >= height:
        return up(width), up(int(up(width) / ratio))
    return up(int(up(height) * ratio)), up(height)


def _exact_positions(module: Any, inputs: Any, named: Any, output: torch.Tensor) -> torch.Tensor:
    """Positions from float32 fractions: transformers before 5.24 rounds them to the pixels' dtype, and then 6 and more
    rows of 24, 26 or 27 take their neighbour's. Tiles are always full."""
    places = module.num_patches_per_side
    fractions = (torch.arange(places, dtype=torch.float32) * (1.0 / torch.tensor(places))).clamp(max=1 - 1e-6)
    rows = torch.bucketize(fractions, torch.arange(1 / places, 1.0, 1 / places), right=True).to(output.device)
    patches: torch.Tensor = module.patch_embedding(named["pixel_values"]).flatten(2).transpose(1, 2)
    return patches + module.position_embedding((rows[:, None] * places + rows).flatten())


def _named(model: Any, tensors: Tensors) -> Tensors:
    """The names of the class -> those of the files; a tied model may store the head alone."""
    found = {}
    for name, _ in model.named_parameters():
        candidates = [name, name.removeprefix("model."), *([HEAD] if name == TABLE else [])]
        held = [one for one in candidates if one in tensors]
        found[name] = held[0] if held else name
    return tensors.renamed(found)


FAMILY = ReferenceFamily(
    name="idefics3",
    speaks=True,
    matches=lambda folder: read_json(folder / "config.json").get("model_type") in CLASSES,
    load=Idefics3,
)
