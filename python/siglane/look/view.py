"""What `siglane look` shows of one picture or video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from siglane.config.vision import VisionConfig
from siglane.types import Grid, ImageLayout

Pixels = npt.NDArray[np.uint8]

MARGIN, GUTTER, COLUMN, GROUP_GAP = 56, 64, 760, 40  # of the page, in pixels


@dataclass(frozen=True, slots=True)
class View:
    """Everything the drawing shows. frames: u8 `[H, W, 3]`, the upright picture, or those of a video; tiles: u8
    `[H, W, 3]`, one per tile of the layout, exactly as the tower gets it; speaks: whether there is a prompt."""

    name: str
    model: str
    frames: tuple[Pixels, ...]
    layout: ImageLayout
    tiles: tuple[Pixels, ...]
    vision: VisionConfig
    speaks: bool


def unpatchify(pixels: npt.NDArray[Any], grids: Sequence[Grid], patch_size: int, channel_first: bool) -> list[Pixels]:
    """The inverse of `image.patchify.patchify`: patch rows back to u8 `[H, W, 3]` tiles."""
    p = patch_size
    tiles = []
    start = 0
    for h, w in grids:
        rows = pixels[start : start + h * w]
        if channel_first:
            shaped = rows.reshape(h, w, 3, p, p).transpose(0, 3, 1, 4, 2)
        else:
            shaped = rows.reshape(h, w, p, p, 3).transpose(0, 2, 1, 3, 4)
        tiles.append(np.clip(np.rint(shaped.reshape(h * p, w * p, 3)), 0, 255).astype(np.uint8))
        start += h * w
    return tiles
