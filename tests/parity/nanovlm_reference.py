"""nanoVLM's image path, image string and prompt, written a second time from formats.md 7.2-7.4 on Pillow, torch and
transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from nanovlm_checkpoint import NanoVlm
from PIL import Image


@dataclass
class Seen:
    """One picture as the model sees it. tiles: `[N, 3, side, side]` of 0..1, the whole picture first where the model is
    shown it; grid: rows and columns of tiles."""

    tiles: torch.Tensor
    grid: tuple[int, int]


def see(reference: NanoVlm, image: Image.Image) -> Seen:
    side = reference.side
    if "max_img_size" not in reference.config:
        return Seen(to_tensor(image.resize((side, side), Image.Resampling.BILINEAR))[None], (1, 1))
    height, width = target(reference, image.height, image.width)
    canvas = to_tensor(image.resize((width, height), Image.Resampling.BICUBIC))
    rows, columns = height // side, width // side
    tiles = [
        canvas[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
        for row in range(rows)
        for column in range(columns)
    ]
    if len(tiles) > 1 and reference.extra("global_image_token"):
        tiles.insert(0, F.interpolate(canvas[None], (side, side), mode="bilinear", antialias=True)[0])
    return Seen(torch.stack(tiles), (rows, columns))


def target(reference: NanoVlm, height: int, width: int) -> tuple[int, int]:
    """Height and width of the resized picture."""
    side, most = reference.side, reference.config["max_img_size"]
    long, short = max(height, width), min(height, width)
    enlarged = reference.config.get("resize_to_max_side_len", False)
    new_long = most if enlarged else min(most, math.ceil(long / side) * side)
    scale = new_long / long
    new_short = max(side, math.ceil(short * scale / side) * side)
    return (new_short, new_long) if width >= height else (new_long, new_short)


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1) / 255


def shuffle(reference: NanoVlm, features: torch.Tensor) -> torch.Tensor:
    """`[N, patches, c]` -> `[N, rows, f * f * c]`, neighbours in the order (row, column), row by row."""
    side, f = math.isqrt(features.shape[1]), reference.factor
    rows = []
    for top in range(0, side, f):
        for left in range(0, side, f):
            block = [features[:, (top + down) * side + left + right] for down in range(f) for right in range(f)]
            rows.append(torch.cat(block, dim=-1))
    return torch.stack(rows, dim=1)


def image_string(reference: NanoVlm, grids: list[tuple[int, int]]) -> str:
    """What `get_image_string` and the older `generate.py` put in front of a question."""
    if reference.era == "0.1":
        return ""
    image = (reference.extra("image_token") or "") * reference.rows
    if reference.era == "0.2":
        return image * len(grids)
    text = ""
    for index, (rows, columns) in enumerate(grids):
        text += f"<image: {index}>" if len(grids) > 1 else ""
        whole = reference.extra("global_image_token")
        text += whole + image if whole else ""
        if whole and (rows, columns) == (1, 1):
            continue
        for row in range(rows):
            for column in range(columns):
                text += (reference.extra(f"r{row + 1}c{column + 1}") or "") + image
    return text


def prompt(reference: NanoVlm, grids: list[tuple[int, int]], question: str) -> str:
    images = image_string(reference, grids)
    if reference.era in ("0.1", "0.2"):
        return f"{images}Question: {question} Answer:"
    return f"<|im_start|>user\n{images}{question}<|im_end|>\n<|im_start|>assistant\n"


def embeds(reference: NanoVlm, text: str, rows: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    """Ids of a prompt, and its embeddings with `rows` `[T, c]` of all tiles in place; release 0.1 puts them first."""
    ids = reference.encode(text)
    table = reference.language.get_input_embeddings().weight
    if reference.era == "0.1":
        return ids, torch.cat([rows, table[ids]])
    place = reference.encode(reference.extra("image_token") or "")[0]
    waiting = iter(rows)
    embedded = torch.stack([next(waiting) if token == place else table[token] for token in ids])
    assert next(waiting, None) is None
    return ids, embedded
