"""NVILA and VILA: transformers' tower and Qwen around VILA's own image path, written from NVlabs/VILA's sources
(formats.md 5). There is no class in transformers to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from siglane.errors import ConfigError
from siglane.verify.references.adapter import tensors_of
from siglane.verify.references.decoder import CHATML, Decoder, filled, load_tokenizer, rendered
from siglane.verify.references.files import Raw, Tensors, classes_in, processor_json, read_json, ready
from siglane.verify.references.pixels import siglip_processing, squares_of
from siglane.verify.references.reference import ReferenceFamily, Seen, VisionLanguageReference
from siglane.verify.references.tower import SiglipTower

IMAGE = "<image>"
PARTS = ("llm", "vision_tower", "mm_projector")
TEMPLATE = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n" + CHATML
# what SGLang's models/nvila.py and nvila_lite.py hard-code: projector, image_aspect_ratio, scales in tiles
HARD_CODED = {
    "NVILAForConditionalGeneration": ("mlp_downsample", "dynamic_s2", (1, 2, 3)),
    "NVILALiteForConditionalGeneration": ("mlp_downsample_3x3_fix", "dynamic", ()),
}
# mm_projector_type -> factor and the widths its norms have, in units of c, negative: divided by
DOWNSAMPLES: dict[str, tuple[int, tuple[int, ...]]] = {
    "mlp_downsample": (2, (4,)),
    "mlp_downsample_2x2_fix": (2, (4,)),
    "mlp_downsample_3x3_fix": (3, (9, 3)),
    "mlp_downsample_3x3_s2": (3, (9, 3, 1, -3)),
    "mlp_downsample_3x3_s2_new": (3, (9, 4, 2, 1, -3)),
}


@dataclass(frozen=True, slots=True)
class Flags:
    """projector: mm_projector_type; aspect: image_aspect_ratio; scales: of dynamic_s2, in pixels."""

    projector: str
    aspect: str
    scales: tuple[int, ...]
    layer: int
    min_tiles: int
    max_tiles: int


class Nvila(VisionLanguageReference):
    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, adapter: Path | None = None) -> None:
        root = read_json(folder / "config.json")
        in_folders = all((folder / part).is_dir() for part in PARTS)
        text, vision = folder / (PARTS[0] if in_folders else ""), folder / (PARTS[1] if in_folders else "")
        language_json = read_json(text / "config.json") if in_folders else root["text_config"]
        vision_json = read_json(vision / "config.json") if in_folders else root["vision_config"]
        tensors = {part: _part(folder, part, in_folders, adapter) for part in PARTS}
        self.flags = _flags(folder, root, vision_json)
        self.tower = SiglipTower(vision_json, tensors["vision_tower"], device, dtype)
        self.language = Decoder.load(language_json, tensors["llm"], device, dtype)
        channels = self.tower.config.hidden_size * max(1, len(self.flags.scales))
        self.projector = build_projector(self.flags.projector, channels, self.language.model.config.hidden_size)
        weights = tensors["mm_projector"]
        ready(self.projector, weights.under("layers.") if weights.readers else weights, device, dtype)
        self.processing = siglip_processing(processor_json(vision) or processor_json(folder), self.tower.side)
        self.side = self.flags.scales[0] if self.flags.scales else self.processing.width
        self.tokenizer, self.text_folder, self.by_processor = load_tokenizer(text, IMAGE), text, not in_folders

    def see(self, pictures: Sequence[Image.Image]) -> Seen:
        alone = len(pictures) == 1
        arranged = [self._tiles(picture, alone) for picture in pictures]
        tiles = [tile for group, _ in arranged for tile in group]
        taps = self.tower.read_at(torch.stack([self.processing.normalised(tile) for tile in tiles]), self.flags.layer)
        by_tile = taps["features"].unflatten(0, (len(tiles), -1))
        read = list(by_tile.split([len(group) for group, _ in arranged]))
        if self.flags.scales:
            read = [self._merged(group, grid) for group, (_, grid) in zip(read, arranged, strict=True)]
            taps["projector_input"] = torch.cat([group.flatten(0, 1) for group in read])
        images = [self._blocks(group, grid) for group, (_, grid) in zip(read, arranged, strict=True)]
        taps["projector"] = torch.cat([rows for image in images for rows in image])
        return Seen(taps, images)

    def text(self, prompt: str, seen: Seen) -> str:
        lite = self.flags.aspect == "dynamic" and len(seen.images) == 1
        images = [(IMAGE + "\n" if lite else IMAGE) * len(image) for image in seen.images]
        return rendered(
            self.text_folder,
            self.tokenizer,
            images,
            prompt,
            TEMPLATE,
            by_processor=self.by_processor,
            placeholder=IMAGE,
        )

    def ids(self, text: str, seen: Seen) -> list[int]:
        """Behind every block of image rows VILA puts the embedding of a line feed."""
        ids, line_feed = self.tokenizer(text).input_ids, self.tokenizer("\n").input_ids
        return filled(ids, self.tokenizer.convert_tokens_to_ids(IMAGE), seen.blocks, line_feed)

    def _tiles(self, picture: Image.Image, alone: bool) -> tuple[list[Image.Image], tuple[int, int] | None]:
        """The crops of one picture, and (columns, rows) of the last scale where scales are merged."""
        side, flags = self.side, self.flags
        if alone and flags.aspect == "dynamic_s2":
            fewest = (flags.scales[-1] // flags.scales[0]) ** 2
            last = closest_grid(*picture.size, side, fewest, flags.max_tiles)
            grids = [(scale // side, scale // side) for scale in flags.scales[:-1]] + [last]
            return [tile for grid in grids for tile in cut(picture, *grid, side)], last
        if alone and flags.aspect == "dynamic":
            grid = closest_grid(*picture.size, side, flags.min_tiles, flags.max_tiles)
            tiles = cut(picture, *grid, side)
            return tiles + (cut(picture, 1, 1, side) if len(tiles) > 1 else []), None
        if flags.aspect == "pad":
            return [self.processing.squared(picture)], None
        if flags.aspect:
            return cut(picture, 1, 1, side), None
        return [self.processing.resized(picture)], None

    def _merged(self, tiles: torch.Tensor, grid: tuple[int, int] | None) -> torch.Tensor:
        """`[tiles, N, c]` of all scales -> `[tiles of the last, N, scales * c]`."""
        if grid is None:
            return tiles.repeat(1, 1, len(self.flags.scales))
        columns, rows = grid
        n = self.tower.grid
        squares = [scale // self.side for scale in self.flags.scales[:-1]]
        shapes = [*((square, square) for square in squares), (rows, columns)]
        maps = [
            F.interpolate(stitched(group, *shape).permute(2, 0, 1)[None].float(), (rows * n, columns * n), mode="area")
            for group, shape in zip(tiles.split([high * wide for high, wide in shapes]), shapes, strict=True)
        ]
        merged = torch.cat(maps, dim=1)[0].permute(1, 2, 0).to(tiles.dtype)
        return torch.stack([
            merged[row * n : (row + 1) * n, column * n : (column + 1) * n].flatten(0, 1)
            for row in range(rows)
            for column in range(columns)
        ])  # fmt: skip

    def _blocks(self, features: torch.Tensor, grid: tuple[int, int] | None) -> list[torch.Tensor]:
        """One block of projected rows per `<image>`: each tile its own, or all of the last scale's map."""
        projected = self.projector(features.to(self.tower.device, self.tower.dtype)).cpu()
        if grid is None:
            return list(projected)
        columns, rows = grid
        return [stitched(projected, rows, columns).flatten(0, 1)]


def closest_grid(width: int, height: int, side: int, fewest: int, most: int) -> tuple[int, int]:
    """(columns, rows) of tiles: VILA's `find_closest_aspect_ratio` over its sorted set of candidates."""
    candidates = {(i, j) for n in range(fewest, most + 1) for i in range(1, n + 1) for j in range(1, n + 1)}
    usable = sorted(pair for pair in candidates if fewest <= pair[0] * pair[1] <= most)
    best, smallest = (1, 1), float("inf")
    for columns, rows in sorted(usable, key=lambda pair: pair[0] * pair[1]):
        difference = abs(width / height - columns / rows)
        larger = width * height > 0.5 * side * side * columns * rows
        if difference < smallest or (difference == smallest and larger):
            best, smallest = (columns, rows), difference
    return best


def cut(picture: Image.Image, columns: int, rows: int, side: int) -> list[Image.Image]:
    """Pillow's default resize to columns x rows squares, row by row."""
    return squares_of(picture.resize((columns * side, rows * side)), side)


def stitched(tiles: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Square tiles `[rows * columns, n * n, c]` -> one map `[rows * n, columns * n, c]`."""
    n = round(tiles.shape[1] ** 0.5)
    squares = tiles.unflatten(1, (n, n))
    lines = [torch.cat(list(squares[row * columns : (row + 1) * columns]), dim=1) for row in range(rows)]
    return torch.cat(lines)


class Downsample(nn.Module):
    """Neighbours onto the channel axis in the order (row, column, channel), zeros below and to the right."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side, factor = round(x.shape[1] ** 0.5), self.factor
        missing = -side % factor
        picture = F.pad(x.unflatten(1, (side, side)).permute(0, 3, 1, 2), (0, missing, 0, missing))
        blocks = F.unfold(picture.float(), factor, stride=factor)  # [B, c * k * k, rows], channel first
        return blocks.unflatten(1, (x.shape[2], factor**2)).permute(0, 3, 2, 1).flatten(2).to(x.dtype)


def build_projector(kind: str, channels: int, width: int) -> nn.Module:
    """The modules of VILA's base_projector.py under their numbers in its nn.Sequential."""
    if kind == "identity":
        return nn.Sequential()
    if kind == "linear":
        return nn.Linear(channels, width)
    if kind in DOWNSAMPLES:
        factor, multiples = DOWNSAMPLES[kind]
        widths = [channels * many if many > 0 else channels // -many for many in multiples]
        modules: list[nn.Module] = [Downsample(factor), nn.LayerNorm(widths[0])]
        for before, after in pairwise(widths):
            modules += [nn.Linear(before, after), nn.GELU(), nn.LayerNorm(after)]
        return nn.Sequential(*modules, nn.Linear(widths[-1], width), nn.GELU(), nn.Linear(width, width))
    depth = kind.removeprefix("mlp").removesuffix("x_gelu")
    if not depth.isdigit():
        raise ConfigError(f"mm_projector_type {kind!r} is not known to the reference")
    modules = [nn.Linear(channels, width)]
    for _ in range(1, int(depth)):
        modules += [nn.GELU(), nn.Linear(width, width)]
    return nn.Sequential(*modules)


def _part(folder: Path, part: str, in_folders: bool, adapter: Path | None) -> Tensors:
    """One part's tensors; none for an identity, which has no weights."""
    if in_folders:
        empty = part == "mm_projector" and not list((folder / part).glob("*.safetensors"))
        return Tensors({}) if empty else tensors_of(folder, adapter, part)
    tensors = tensors_of(folder, adapter)
    held = any(name.startswith(f"{part}.") for name in tensors.readers)
    return tensors.under(f"{part}.") if held or part != "mm_projector" else Tensors({})


def _flags(folder: Path, root: Raw, vision: Raw) -> Flags:
    side = vision.get("image_size", 224)
    for architecture in classes_in(root):
        if architecture in HARD_CODED:
            projector, aspect, tiles = HARD_CODED[architecture]
            return Flags(projector, aspect, tuple(side * many for many in tiles), -2, 1, 12)
    own = read_json(folder / "mm_projector/config.json") or root.get("mm_projector_cfg") or root
    in_folders = (folder / "mm_projector").is_dir()
    aspect = root.get("image_aspect_ratio") or ("" if in_folders else "dynamic")
    stated: Any = root.get("s2_scales") or ()
    scales = stated.split(",") if isinstance(stated, str) else stated
    return Flags(
        projector=own["mm_projector_type"],
        aspect=aspect,
        scales=tuple(sorted(int(scale) for scale in scales)) if aspect == "dynamic_s2" else (),
        layer=root.get("mm_vision_select_layer", -2),
        min_tiles=root.get("min_tiles", 1),
        max_tiles=root.get("max_tiles", 12),
    )


def _matches(folder: Path) -> bool:
    root = read_json(folder / "config.json")
    announced = {*classes_in(root), root.get("model_type")}
    known = {*HARD_CODED, "VILAForConditionalGeneration", "vila"}
    return bool(root) and (bool(announced & known) or all((folder / part).is_dir() for part in PARTS))


FAMILY = ReferenceFamily(name="nvila", speaks=True, matches=_matches, load=Nvila)
