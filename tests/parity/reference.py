"""VILA's image path and prompt, written a second time from formats.md 5.2-5.6 on PIL and transformers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from checkpoints import Reference
from PIL import Image

SYSTEM = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"


@dataclass
class Encoded:
    """features: what the projector reads, one tensor per image; rows: per image, one tensor per `<image>`."""

    features: list[torch.Tensor]
    rows: list[list[torch.Tensor]]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise, so that resizing and order both matter."""
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(seed).integers(0, 40, (height, width, 3))
    colours = np.stack([x * 200 // width, y * 200 // height, (x + 2 * y + 37 * seed) % 200], axis=-1)
    return Image.fromarray((colours + noise).astype(np.uint8))


def encode(reference: Reference, images: list[Image.Image], *, lite: bool) -> Encoded:
    alone = len(images) == 1
    encoded = [_lite(reference, image, alone) if lite else _s2(reference, image, alone) for image in images]
    return Encoded([features for features, _ in encoded], [rows for _, rows in encoded])


def closest_grid(width: int, height: int, side: int, fewest: int, most: int) -> tuple[int, int]:
    """(columns, rows)."""
    pairs = {(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if fewest <= i * j <= most}
    best, difference = (1, 1), float("inf")
    for columns, rows in sorted(sorted(pairs), key=lambda pair: pair[0] * pair[1]):
        now = abs(width / height - columns / rows)
        if now < difference or (now == difference and width * height > 0.5 * side * side * columns * rows):
            best, difference = (columns, rows), now
    return best


def cut(image: Image.Image, columns: int, rows: int, side: int) -> list[Image.Image]:
    resized = image.resize((columns * side, rows * side))
    return [
        resized.crop((c * side, r * side, (c + 1) * side, (r + 1) * side)) for r in range(rows) for c in range(columns)
    ]


def tower(reference: Reference, tiles: list[Image.Image]) -> torch.Tensor:
    """[tiles, patches, hidden_size]: the output of the last block but one, without post_layernorm."""
    pixels = torch.stack([torch.from_numpy(np.array(tile)).permute(2, 0, 1) for tile in tiles])
    with torch.no_grad():
        states = reference.tower(pixel_values=(pixels / 255 - 0.5) / 0.5, output_hidden_states=True).hidden_states
    return states[-2]


def project(reference: Reference, features: torch.Tensor) -> torch.Tensor:
    assert reference.projector is not None
    with torch.no_grad():
        return reference.projector(features)


def prompt_ids(reference: Reference, text: str, rows: list[list[torch.Tensor]]) -> list[int]:
    """Ids of a finished text with one `<image>` per block of rows: the block, then the line feed's own id."""
    image_token, line_feed = reference.token("<image>"), reference.encode("\n")
    blocks = iter([block for image in rows for block in image])
    ids: list[int] = []
    for token in reference.encode(text):
        ids += [image_token] * len(next(blocks)) + line_feed if token == image_token else [token]
    return ids


def chat(value: str, system: str = SYSTEM) -> str:
    return f"{system}<|im_start|>user\n{value}<|im_end|>\n<|im_start|>assistant\n"


def embeds(reference: Reference, ids: list[int], rows: list[list[torch.Tensor]]) -> torch.Tensor:
    """[T, hidden_size] with every placeholder replaced by its row."""
    flat = iter([row for image in rows for block in image for row in block])
    image_token = reference.token("<image>")
    table = reference.language.get_input_embeddings().weight.detach()
    return torch.stack([next(flat) if token == image_token else table[token] for token in ids])


def _lite(reference: Reference, image: Image.Image, alone: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    side = reference.side
    columns, rows = closest_grid(*image.size, side, 1, 12) if alone else (1, 1)
    tiles = cut(image, columns, rows, side)
    if len(tiles) > 1:
        tiles += cut(image, 1, 1, side)
    features = tower(reference, tiles)
    return features.flatten(0, 1), list(project(reference, features))


def _s2(reference: Reference, image: Image.Image, alone: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    side, patches = reference.side, reference.patches
    if not alone:
        features = torch.cat([tower(reference, cut(image, 1, 1, side))] * 3, dim=-1)
        return features[0], [project(reference, features)[0]]
    columns, rows = closest_grid(*image.size, side, 9, 12)
    maps = []
    for across, down in ((1, 1), (2, 2), (columns, rows)):
        tiles = tower(reference, cut(image, across, down, side)).unflatten(1, (patches, patches))
        lines = [torch.cat([tiles[r * across + c] for c in range(across)], dim=1) for r in range(down)]
        whole = torch.cat(lines, dim=0).permute(2, 0, 1)[None]
        maps.append(F.interpolate(whole, size=(rows * patches, columns * patches), mode="area")[0].permute(1, 2, 0))
    merged = torch.cat(maps, dim=-1)
    tiles = torch.stack([
        merged[r * patches : (r + 1) * patches, c * patches : (c + 1) * patches].flatten(0, 1)
        for r in range(rows) for c in range(columns)
    ])  # fmt: skip
    projected = project(reference, tiles)
    half = round(projected.shape[1] ** 0.5)
    projected = projected.unflatten(1, (half, half))
    lines = [torch.cat([projected[r * columns + c] for c in range(columns)], dim=1) for r in range(rows)]
    return tiles.flatten(0, 1), [torch.cat(lines, dim=0).flatten(0, 1)]
