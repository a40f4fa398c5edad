"""LLaVA-OneVision: transformers' own class, the pictures prepared on Pillow as its processor does (formats.md 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
from transformers.image_processing_utils import select_best_resolution

from siglane.verify.references.adapter import tensors_of
from siglane.verify.references.decoder import PLACE, Decoder, filled, load_tokenizer, rendered
from siglane.verify.references.files import Tensors, media_token, processor_json, read_json, ready, unset
from siglane.verify.references.pixels import CLIP_MEAN, CLIP_STD, Processing, patches_of, squares_of
from siglane.verify.references.reference import ReferenceFamily, Seen, VisionLanguageReference
from siglane.verify.references.tapping import tapping
from siglane.verify.references.tower import stages_of, up_to
from siglane.verify.stages import Trace

IMAGE = "<image>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'image' %}"
    "<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


class LlavaOnevision(VisionLanguageReference):
    template = TEMPLATE  # of folders without one

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, adapter: Path | None = None) -> None:
        raw, processor = read_json(folder / "config.json"), processor_json(folder)
        config: Any = LlavaOnevisionConfig
        self.config: Any = config.from_dict({**raw, "model_type": "llava_onevision"})  # relatives have their own
        self.device, self.dtype = device, dtype
        tensors = tensors_of(folder, adapter)
        stored = [tensors[name] for name in tensors.readers if name.endswith(("lm_head.weight", "embed_tokens.weight"))]
        if len(stored) == 2 and not torch.equal(*stored):  # then each is used, tied or not
            self.config.tie_word_embeddings = self.config.text_config.tie_word_embeddings = False
        self.model = unset(self.built)
        ready(self.model, _named(self.model, tensors), device, dtype)
        self.language = Decoder(self.model, self.model.model.language_model.layers)
        self.processing = Processing.of(processor, 384, Image.Resampling.BICUBIC, mean=CLIP_MEAN, std=CLIP_STD)
        self.pinpoints: list[list[int]] = processor.get("image_grid_pinpoints", self.config.image_grid_pinpoints)
        self.folder, self.image = folder, media_token(folder, "image_token", IMAGE)
        self.tokenizer = load_tokenizer(folder, self.image)

    def built(self) -> Any:
        """The model, not yet filled."""
        return LlavaOnevisionForConditionalGeneration(self.config)

    def run(self, pictures: Sequence[Image.Image], prompt: str, steps: int) -> Trace:
        """transformers' class cuts, encodes and splices by itself, a second time."""
        seen = self.see(pictures)
        ids = torch.tensor([self.ids(self.text(prompt, seen), seen)], device=self.device)
        ids[ids == PLACE] = self.config.image_token_id
        return {**seen.taps, **self.language.answer({"input_ids": ids, **self._inputs(pictures)}, steps)}

    def see(self, pictures: Sequence[Image.Image]) -> Seen:
        inputs, vision = self._inputs(pictures), self.config.vision_config
        with tapping(stages_of(self.model.model.vision_tower)) as taps:
            images = self.model.get_image_features(**inputs, return_dict=True).pooler_output
        pixels = inputs["pixel_values"].flatten(0, 1).cpu()
        stages = up_to(taps, self.config.vision_feature_layer % (vision.num_hidden_layers + 1))
        preprocessing, projector = patches_of(pixels, vision.patch_size), torch.cat(list(images)).cpu()
        taps = {"preprocessing": preprocessing, **stages, "projector": projector}
        return Seen(taps, [[rows] for rows in images])

    def text(self, prompt: str, seen: Seen) -> str:
        images = [self.image] * len(seen.images)
        return rendered(self.folder, self.tokenizer, images, prompt, self.template, by_processor=True)

    def ids(self, text: str, seen: Seen) -> list[int]:
        return filled(self.tokenizer(text).input_ids, self.tokenizer.convert_tokens_to_ids(self.image), seen.blocks)

    def _inputs(self, pictures: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        pixels = self.prepared(pictures).to(self.device, self.dtype)
        return {
            "pixel_values": pixels[None] if len(pictures) == 1 else pixels[:, None],
            "image_sizes": torch.tensor([(picture.height, picture.width) for picture in pictures]),
            "batch_num_images": torch.tensor([len(pictures)]),
        }

    def prepared(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """f32 `[tiles, 3, side, side]` of one request."""
        alone = len(pictures) == 1
        if alone:
            tiles = anyres_tiles(pictures[0], self.pinpoints, self.processing)
        else:
            tiles = [self.processing.squared(picture) for picture in pictures]
        return torch.stack([self.processing.normalised(tile) for tile in tiles])


def anyres_tiles(picture: Image.Image, pinpoints: list[list[int]], processing: Processing) -> list[Image.Image]:
    """The whole picture squashed, then the tiles of the pinpoint (height, width) that shows most of it."""
    height, width = select_best_resolution((picture.height, picture.width), pinpoints)
    scale_w, scale_h = width / picture.width, height / picture.height
    if scale_w < scale_h:
        size = (width, min(math.ceil(picture.height * scale_w), height))
    else:
        size = (min(math.ceil(picture.width * scale_h), width), height)
    canvas = Image.new("RGB", (width, height))
    resized = picture.resize(size, processing.resample)
    canvas.paste(resized, ((width - size[0]) // 2, (height - size[1]) // 2))
    return [processing.resized(picture), *squares_of(canvas, processing.height)]


def _named(model: Any, tensors: Tensors) -> Tensors:
    """The names of the class in memory -> those of the files, hub's or transformers 5's."""
    found = {}
    for name, _ in model.named_parameters():
        part, _, rest = name.removeprefix("model.").partition(".")
        bare = rest.removeprefix("vision_model.")
        heads = ["language_model.lm_head.weight", "lm_head.weight"]
        candidates = {
            "vision_tower": [f"vision_tower.vision_model.{bare}", f"vision_tower.{bare}"],
            "language_model": [f"language_model.model.{rest}", f"language_model.{rest}"],
            "lm_head": heads,
        }.get(part, [name.removeprefix("model.")])
        if name.endswith("embed_tokens.weight"):
            candidates += heads  # a tied model may store the head alone
        held = [f"{prefix}{one}" for one in candidates for prefix in ("", "model.") if f"{prefix}{one}" in tensors]
        found[name] = held[0] if held else candidates[0]
    return tensors.renamed(found)


FAMILY = ReferenceFamily(
    name="llava_onevision",
    speaks=True,
    matches=lambda folder: read_json(folder / "config.json").get("model_type") == "llava_onevision",
    load=LlavaOnevision,
)
