"""The packed interface for callers who bring their own pixels: patches of any number of pictures in one tensor.

`hidden_states [total_patches, patch_size * patch_size * 3]`, pictures one after another, patches in raster order,
inside a patch (row, column, channel); `grid_thw [n, 3]` holds frames, rows and columns of each picture. No padding and
no mask: the attention of one picture never meets another's. A picture of t > 1 frames counts as t pictures of one
frame, as in Ovis2.5: each frame gets the positions of its own grid and attends to itself only. (The code this interface
comes from, EvolvingLMMs-Lab/OneVision-Encoder, gives all frames but the first the position of the first patch.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from siglane.types import Grid, PackedPatches
from siglane.vision.tower import SiglipVisionModel, Taps

CHANNELS = 3


def convert_to_packing_format(
    images: torch.Tensor | Sequence[torch.Tensor], patch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures `[3, H, W]`, or frames `[t, 3, H, W]`, or one batch `[B, 3, H, W]` -> hidden_states, grid_thw (i64).

    A batch is B pictures, each element of a sequence is one. ValueError for sides that are not multiples of
    `patch_size`, other channels or no pictures.
    """
    items = list(images) if isinstance(images, torch.Tensor) and images.ndim == 4 else images
    if isinstance(items, torch.Tensor):
        raise ValueError(f"images must be [B, 3, H, W] or a list of [3, H, W] or [t, 3, H, W], got {list(items.shape)}")
    if not items:
        raise ValueError("images is empty; give at least one picture")
    rows, grids = [], []
    for number, image in enumerate(items):
        frames = image[None] if image.ndim == 3 else image
        if frames.ndim != 4 or frames.shape[1] != CHANNELS or min(frames.shape) < 1:
            raise ValueError(f"images[{number}] must be [3, H, W] or [t, 3, H, W], got {list(image.shape)}")
        t, _, height, width = frames.shape
        if height % patch_size or width % patch_size:
            raise ValueError(f"images[{number}] is {width}x{height}; both sides must be multiples of {patch_size}")
        h, w = height // patch_size, width // patch_size
        patches = frames.unflatten(3, (w, patch_size)).unflatten(2, (h, patch_size))  # [t, c, h, y, w, x]
        rows.append(patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(0, 2))
        grids.append((t, h, w))
    return torch.cat(rows), torch.tensor(grids)


def convert_from_packing_format(
    hidden_states: torch.Tensor, grid_thw: torch.Tensor | Sequence[Sequence[int]], patch_size: int
) -> list[torch.Tensor]:
    """The inverse: one `[t, 3, H, W]` per row of grid_thw. ValueError when counts or patch sizes do not agree."""
    grids = checked_grids(grid_thw, hidden_states)
    if hidden_states.shape[1] != CHANNELS * patch_size**2:
        raise ValueError(
            f"hidden_states hold {hidden_states.shape[1]} values per patch, not {CHANNELS * patch_size**2}"
        )
    parts = hidden_states.split([t * h * w for t, h, w in grids])
    return [
        part.unflatten(1, (patch_size, patch_size, CHANNELS))
        .unflatten(0, (t, h, w))
        .permute(0, 5, 1, 3, 2, 4)
        .flatten(4, 5)
        .flatten(2, 3)
        for part, (t, h, w) in zip(parts, grids, strict=True)
    ]


def encode_packed(
    tower: SiglipVisionModel,
    hidden_states: torch.Tensor,
    grid_thw: torch.Tensor | Sequence[Sequence[int]],
    taps: Taps | None = None,
) -> torch.Tensor:
    """hidden_states and grid_thw as above, normalised as the tower was trained -> `[total_patches, hidden_size]`.

    For a plain SigLIP or SigLIP2 tower the reference's `last_hidden_state`: post_layernorm applied, not pooled.
    hidden_states is moved to the tower's device and dtype. ValueError says what does not fit.
    """
    config = tower.config
    grids = checked_grids(grid_thw, hidden_states)
    if hidden_states.shape[1] != config.patch_dim:
        raise ValueError(
            f"hidden_states hold {hidden_states.shape[1]} values per patch, the tower reads {config.patch_dim}"
        )
    weight = tower.patch_embedding.weight
    pixels = hidden_states.to(weight.device, weight.dtype)
    if config.patch_layout == "channel_first":
        pixels = pixels.unflatten(1, (-1, config.num_channels)).transpose(1, 2).flatten(1)
    features: torch.Tensor = tower(
        PackedPatches(pixels, tuple(Grid(h, w) for t, h, w in grids for _ in range(t))), taps
    )
    return features


def checked_grids(
    grid_thw: torch.Tensor | Sequence[Sequence[int]], hidden_states: torch.Tensor
) -> list[tuple[int, int, int]]:
    """grid_thw as integers. ValueError unless it is `[n, 3]`, positive, and covers hidden_states exactly."""
    listed = grid_thw.tolist() if isinstance(grid_thw, torch.Tensor) else [list(row) for row in grid_thw]
    if not listed or any(not isinstance(row, list) or len(row) != 3 for row in listed):
        raise ValueError(f"grid_thw must be [n, 3] (frames, rows, columns), got {listed}")
    for number, row in enumerate(listed):
        if not all(isinstance(side, int) and side > 0 for side in row):
            raise ValueError(f"grid_thw[{number}] must hold positive integers, got {row}")
    patches = sum(t * h * w for t, h, w in listed)
    if hidden_states.ndim != 2 or hidden_states.shape[0] != patches:
        raise ValueError(f"grid_thw holds {patches} patches, hidden_states are {list(hidden_states.shape)}")
    return [(t, h, w) for t, h, w in listed]
