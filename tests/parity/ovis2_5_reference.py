"""Ovis2.5 written a second time from formats.md section 3, in the reference's own order of patches: 2 x 2 blocks.

Plain and slow on purpose: attention is one masked product over all patches, positions are loops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from ovis2_5_checkpoint import FACTOR, INDICATORS, PATCH, STRIDE, OvisReference
from PIL import Image
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

IMAGE, VIDEO, ATOM = -200, -201, -300
INDICATOR_IDS = (-301, -302, -303, -304)


@dataclass
class Seen:
    """One image or video. grid: frames, rows and columns of patches; order: for each row of the taps its place in
    raster order; taps: by siglane's names, rows in block order; atoms: what the language model reads between the
    indicators."""

    grid: tuple[int, int, int]
    order: list[int]
    taps: dict[str, torch.Tensor]
    atoms: torch.Tensor


@torch.no_grad()
def see(reference: OvisReference, frames: Sequence[Image.Image]) -> Seen:
    pixels = preprocess(reference, frames)
    grid = (pixels.shape[0], pixels.shape[2] // PATCH, pixels.shape[3] // PATCH)
    places = block_order(*grid)
    taps = tower(reference, patchify(pixels), grid, places)
    return Seen(grid, [(t * grid[1] + y) * grid[2] + x for t, y, x in places], taps, atoms(reference, taps["features"]))


def preprocess(reference: OvisReference, frames: Sequence[Image.Image]) -> torch.Tensor:
    """`[t, 3, H, W]`, every frame at the size that suits the first."""
    height, width = smart_resize(frames[0].height, frames[0].width, FACTOR, *reference.bounds)
    resized = [np.array(frame.resize((width, height), Image.Resampling.BILINEAR)) for frame in frames]
    return (torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def smart_resize(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Height and width, as formats.md 3.2 has it in words."""
    if height < factor or width < factor:
        scale = factor / min(height, width)
        width, height = (factor, round(scale * height)) if width <= height else (round(scale * width), factor)
    elif max(height, width) / min(height, width) > 200:
        height, width = (200 * width, width) if height > width else (height, 200 * height)
    rounded = [round(side / factor) * factor for side in (height, width)]
    if rounded[0] * rounded[1] > most:
        shrink = math.sqrt(height * width / most)
        rounded = [math.floor(side / shrink / factor) * factor for side in (height, width)]
    elif rounded[0] * rounded[1] < least:
        grow = math.sqrt(least / (height * width))
        rounded = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return rounded[0], rounded[1]


def patchify(pixels: torch.Tensor) -> torch.Tensor:
    """`[t, 3, H, W]` -> `[patches, 3 * PATCH**2]` in block order, elements (c, y, x)."""
    frames, _, height, width = pixels.shape
    split = pixels.reshape(
        frames, 1, 3, height // FACTOR, STRIDE, PATCH, width // FACTOR, STRIDE, PATCH
    )  # t, tps, c, H, dr, py, W, dc, px
    return split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * PATCH * PATCH)


def block_order(frames: int, rows: int, columns: int) -> list[tuple[int, int, int]]:
    """Frame, row and column of every patch, 2 x 2 blocks one after another, top left, top right, bottom left, right."""
    return [
        (frame, row + down, column + right)
        for frame in range(frames)
        for row in range(0, rows, STRIDE)
        for column in range(0, columns, STRIDE)
        for down in range(STRIDE)
        for right in range(STRIDE)
    ]


def tower(
    reference: OvisReference,
    patches: torch.Tensor,
    grid: tuple[int, int, int],
    places: list[tuple[int, int, int]],
) -> dict[str, torch.Tensor]:
    model = reference.tower
    embeddings = model.get_submodule("embeddings" if hasattr(model, "embeddings") else "vision_model.embeddings")
    taps = {"patch_embedding": embeddings.patch_embedding(patches.reshape(-1, 3, PATCH, PATCH)).flatten(1)}
    table = embeddings.position_embedding.weight
    side = math.isqrt(len(table))
    square = table.reshape(side, side, -1).permute(2, 0, 1)[None]
    resized = F.interpolate(square, size=grid[1:], mode="bicubic", align_corners=False)[0]
    x = taps["positions"] = taps["patch_embedding"] + torch.stack([resized[:, y, x] for _, y, x in places])
    rotary = rotary_tables(reference, places)
    layers = model.get_submodule("encoder" if hasattr(model, "encoder") else "vision_model.encoder").layers
    for number, layer in enumerate(layers):
        windowed = reference.windows is not None and number not in reference.windows[1]
        side = reference.windows[0] if windowed and reference.windows else 10**9
        groups = [(frame, y // side, x // side) for frame, y, x in places]
        x = x + attend(reference, layer.self_attn, layer.layer_norm1(x), groups, rotary)
        x = x + layer.mlp(layer.layer_norm2(x))
        taps[f"block.{number}"] = x
    taps["features"] = x
    return taps


def rotary_tables(reference: OvisReference, places: list[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    config = reference.tower.config
    head_dim = config.hidden_size // config.num_attention_heads
    quarter = [10000.0 ** (-2 * number / (head_dim / 2)) for number in range(head_dim // 4)]
    angles = torch.tensor([[y * f for f in quarter] + [x * f for f in quarter] for _, y, x in places])
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def attend(
    reference: OvisReference,
    attention: torch.nn.Module,
    x: torch.Tensor,
    groups: list[tuple[int, int, int]],
    rotary: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    heads = reference.tower.config.num_attention_heads
    q, k, v = (attention.get_submodule(f"{name}_proj")(x).unflatten(-1, (heads, -1)) for name in ("q", "k", "v"))
    if reference.rope:
        q, k = apply_rotary_pos_emb_vision(q, k, *rotary)
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    member = torch.tensor([numbers[group] for group in groups])
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(member[:, None] != member[None, :], -torch.inf)
    mixed = torch.einsum("hqk,khd->qhd", scores.float().softmax(-1).to(v.dtype), v)
    return attention.get_submodule("out_proj")(mixed.flatten(1))


def atoms(reference: OvisReference, features: torch.Tensor) -> torch.Tensor:
    """The expected row of the whole table; the indicators' probabilities are zero."""
    logits = reference.head(features.reshape(-1, STRIDE**2 * features.shape[-1]))
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32).to(logits.dtype)
    padded = torch.cat((probabilities, torch.zeros(len(probabilities), INDICATORS, dtype=logits.dtype)), dim=1)
    return padded @ reference.vte.to(logits.dtype)


def prompt_ids(reference: OvisReference, text: str, seen: Sequence[Seen]) -> list[int]:
    """Ids of a finished text with `<image>` or `<video>` in it: the pieces between them are tokenised one by one."""
    placeholder = "<video>" if "<video>" in text else "<image>"
    first, *others = text.split(placeholder)
    ids = reference.encode(first)
    for piece, one in zip(others, seen, strict=True):
        start, end = INDICATOR_IDS[2:] if placeholder == "<video>" else INDICATOR_IDS[:2]
        ids += [start, *[ATOM] * len(one.atoms), end, *reference.encode(piece)]
    return ids


@torch.no_grad()
def embeds(reference: OvisReference, ids: Sequence[int], seen: Sequence[Seen]) -> torch.Tensor:
    """`[T, hidden_size]`: ids below zero read row 0, then indicators and atoms take their places."""
    found = torch.tensor(ids)
    rows = reference.language.get_input_embeddings().weight[found.clamp(min=0)].clone()
    for number, indicator in enumerate(INDICATOR_IDS):
        rows[found == indicator] = reference.vte[len(reference.vte) - INDICATORS + number].to(rows.dtype)
    if seen:
        rows[found == ATOM] = torch.cat([one.atoms for one in seen]).to(rows.dtype)
    return rows


@torch.no_grad()
def greedy(reference: OvisReference, rows: torch.Tensor, steps: int) -> list[int]:
    chosen = reference.language.generate(
        inputs_embeds=rows[None], attention_mask=torch.ones(1, len(rows)), max_new_tokens=steps, min_new_tokens=steps,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    found: list[int] = chosen[0].tolist()
    return found
