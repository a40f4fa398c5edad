"""LLaVA's original layout: transformers' SigLIP and Qwen2, put together as LLaVA-NeXT's `llava_arch.py` does.

Several pictures are padded, as its example of several pictures does by hand; a video is a sequence of frames.
"""

from __future__ import annotations

import math
import re
from ast import literal_eval
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers.image_processing_utils import select_best_resolution

from siglane.verify.references.adapter import tensors_of
from siglane.verify.references.decoder import PLACE, Decoder, load_tokenizer
from siglane.verify.references.files import Raw, Tensors, classes_in, read_json, ready
from siglane.verify.references.llava_onevision import anyres_tiles
from siglane.verify.references.pixels import Processing, siglip_processing
from siglane.verify.references.reference import ReferenceFamily, Seen, VisionLanguageReference
from siglane.verify.references.tower import SiglipTower

NEWLINE = "model.image_newline"
TENSORS = "model.vision_tower.vision_tower.vision_model."
SO400M: Raw = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "image_size": 384, "patch_size": 14,
}  # fmt: skip
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
BEHIND = "<|im_end|>\n<|im_start|>assistant\n"


class LlavaQwen(VisionLanguageReference):
    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, adapter: Path | None = None) -> None:
        self.raw, tensors = read_json(folder / "config.json"), tensors_of(folder, adapter)
        if NEWLINE not in tensors:  # taken for a trainer's wrapper where every name begins so
            tensors = Tensors({f"model.{name}": read for name, read in tensors.readers.items()})
        self.tower, self.layer = _tower(folder, self.raw, tensors, device, dtype)
        wide, width = self.tower.config.hidden_size, self.raw["hidden_size"]
        self.projector: Any = nn.Sequential(nn.Linear(wide, width), nn.GELU(), nn.Linear(width, width))
        ready(self.projector, tensors.under("model.mm_projector."), device, dtype)
        self.newline = tensors[NEWLINE].to(device, dtype)
        self.language = Decoder.load({**self.raw, "model_type": "qwen2"}, tensors, device, dtype)
        self.processing: Processing = siglip_processing({}, self.tower.side)
        self.tokenizer = load_tokenizer(folder)

    def see(self, pictures: Sequence[Image.Image | Sequence[Image.Image]]) -> Seen:
        alone = sum(isinstance(medium, Image.Image) for medium in pictures) == 1
        tiles = [self.prepared(medium, alone=alone) for medium in pictures]
        taps = self.tower.read_at(torch.cat(tiles), self.layer)
        features = taps["features"].to(self.newline.device).unflatten(0, (-1, self.tower.grid**2))
        projected = self.projector(features).split([len(one) for one in tiles])
        rows = [self._joined(one, medium) for one, medium in zip(projected, pictures, strict=True)]
        return Seen({**taps, "projector": torch.cat(rows).cpu()}, [[one] for one in rows])

    def prepared(self, medium: Image.Image | Sequence[Image.Image], *, alone: bool) -> torch.Tensor:
        """f32 `[tiles, 3, side, side]`. alone: it is the only picture of its request."""
        if not isinstance(medium, Image.Image):
            tiles = [self.processing.resized(frame) for frame in medium]
        elif alone and self.raw["image_aspect_ratio"] != "pad":
            tiles = anyres_tiles(medium, pinpoints_of(self.raw, self.tower.side), self.processing)
        else:
            tiles = [self.processing.squared(medium)]
        return torch.stack([self.processing.normalised(tile) for tile in tiles])

    def _joined(self, rows: torch.Tensor, medium: Image.Image | Sequence[Image.Image]) -> torch.Tensor:
        """rows `[tiles, patches of a tile, width]` of one picture or video -> what the language model reads."""
        maps = rows.transpose(1, 2).unflatten(2, (self.tower.grid, self.tower.grid))
        if not isinstance(medium, Image.Image):
            return self._video(maps)
        if len(rows) == 1:
            return torch.cat((rows[0], self.newline[None]))
        columns, lines, kept = map_of(medium.size, self.raw, self.tower.side, self.tower.grid)
        whole = maps[1:].unflatten(0, (lines, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
        top, left = ((side - length) // 2 for side, length in zip(whole.shape[1:], kept[:2], strict=True))
        shown = whole[:, top : whole.shape[1] - top, left : whole.shape[2] - left]
        if kept[2:]:
            shown = F.interpolate(shown[None], size=kept[2:], mode="bilinear")[0]
        return torch.cat((rows[0], self._lines(shown)))

    def _video(self, maps: torch.Tensor) -> torch.Tensor:
        match self.raw["mm_spatial_pool_mode"]:
            case "average":
                pooled = F.avg_pool2d(maps, 2)
            case "max":
                pooled = F.max_pool2d(maps, 2)
            case "bilinear":
                pooled = F.interpolate(maps, size=[math.ceil(self.tower.grid / 2)] * 2, mode="bilinear")
        flat = pooled.flatten(2).transpose(1, 2)
        match self.raw.get("mm_newline_position", "one_token"):
            case "grid":
                return torch.cat([self._lines(frame) for frame in pooled])
            case "frame":
                return torch.cat([row for frame in flat for row in (frame, self.newline[None])])
            case "one_token":
                return torch.cat((flat.flatten(0, 1), self.newline[None]))
        return flat.flatten(0, 1)

    def _lines(self, picture: torch.Tensor) -> torch.Tensor:
        """`[width, h, w]` -> `[h * (w + 1), width]`, a newline behind each line."""
        ends = self.newline[:, None, None].expand(-1, picture.shape[1], 1)
        return torch.cat((picture, ends), dim=2).flatten(1).T

    def text(self, prompt: str, seen: Seen) -> str:
        return BEFORE + "<image>\n" * len(seen.images) + prompt + BEHIND

    def ids(self, text: str, seen: Seen) -> list[int]:
        waiting = iter(seen.blocks)
        ids: list[int] = []
        for part in re.split("(<image>)", text):
            ids += [PLACE] * len(next(waiting)) if part == "<image>" else self.tokenizer(part).input_ids
        return ids


def _tower(
    folder: Path, raw: Raw, tensors: Tensors, device: torch.device, dtype: torch.dtype
) -> tuple[SiglipTower, int]:
    """The tower, and which of its hidden states are read: of a stored one the last, of a public one the one before."""
    beside = folder / raw["mm_vision_tower"]
    facts = read_json(beside / "config.json") or SO400M
    facts = facts.get("vision_config", facts)
    blocks = {name.removeprefix(f"{TENSORS}encoder.layers.").partition(".")[0] for name in tensors.readers}
    stored = sum(number.isdigit() for number in blocks)
    if stored:
        return SiglipTower({**facts, "num_hidden_layers": stored}, tensors.under(TENSORS), device, dtype), -1
    return SiglipTower(facts, Tensors.of(beside), device, dtype), -2


def pinpoints_of(raw: Raw, side: int) -> list[list[int]]:
    """[height, width] of every canvas; in the file width stands first."""
    found = raw["image_grid_pinpoints"]
    if isinstance(found, str) and "x" in found:
        pairs = re.findall(r"\((\d+)x(\d+)\)", found)
        (left, top), (right, bottom) = (map(int, pairs[0]), map(int, pairs[-1]))
        found = [(w * side, h * side) for w in range(left, right + 1) for h in range(top, bottom + 1)]
    elif isinstance(found, str):
        found = literal_eval(found)
    return [[height, width] for width, height in found]


def map_of(size: tuple[int, int], raw: Raw, side: int, grid: int) -> tuple[int, int, tuple[int, ...]]:
    """Of a tiled picture of `size` (width, height): columns and rows of tiles; then rows and columns of the map without
    its padding, and those that it is brought to where it has too many."""
    width, height = size
    canvas = select_best_resolution((height, width), pinpoints_of(raw, side))
    rows, columns = canvas[0] // side, canvas[1] // side
    high, wide = rows * grid, columns * grid
    if width / height > wide / high:
        shown = int(height * (wide / width))
        high -= (high - shown) // 2 * 2
    else:
        shown = int(width * (high / height))
        wide -= (wide - shown) // 2 * 2
    most = re.match(r"anyres_max_(\d+)", raw["image_aspect_ratio"])
    times = math.sqrt(high * wide / (int(most[1]) * grid**2)) if most else 1.0
    return columns, rows, (high, wide, *((int(high // times), int(wide // times)) if times > 1.1 else ()))


def _matches(folder: Path) -> bool:
    raw = read_json(folder / "config.json")
    return "LlavaQwenForCausalLM" in classes_in(raw) or raw.get("model_type") == "llava_qwen"


FAMILY = ReferenceFamily(name="llava_qwen", speaks=True, matches=_matches, load=LlavaQwen)
