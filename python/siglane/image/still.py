"""Rows of a video's frames that show what the frame before shows: left out of the prompt (VideoLLaMA3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from siglane.config.preprocess import PreprocessConfig
from siglane.types import ImageLayout, ImagePlaceholder, MergedFirst, Piece

STILL = 0.1  # mean difference of normalised pixels, times 255, up to which nothing has moved
FEWEST = 1  # rows that every frame keeps, from its first on


def settled(layout: ImageLayout, pixels: torch.Tensor, preprocess: PreprocessConfig) -> ImageLayout:
    """`layout` as it is once its pixels are known: without the rows of still parts where it says so.

    pixels: `[layout.patches, patch_dim]` on the scale 0..255. transformers 5.19 `VideoLlama3VideoProcessor
    ._get_compression_mask`, which is the authors' too: a merged row counts as one part, and is compared with the one at
    its place in the frame before, whether that was left out or not.
    """
    match layout.assembly:
        case MergedFirst(drops_still=True, kept=None) if layout.frames > 1:
            kept = _moved(layout, pixels, preprocess)
        case _:
            return layout
    kept[:, :FEWEST] |= kept.sum(1, keepdim=True) < FEWEST
    assembly = MergedFirst(drops_still=True, kept=bytes(kept.flatten().to(torch.uint8).tolist()))
    return replace(layout, pieces=tuple(_pieces(layout, kept.sum(1).tolist())), assembly=assembly)


def _moved(layout: ImageLayout, pixels: torch.Tensor, preprocess: PreprocessConfig) -> torch.Tensor:
    """Booleans `[frames, rows of a frame]`, true in the first frame."""
    grid, rows, channels = layout.grids[0], layout.projected[0], len(preprocess.std)
    down, across = grid.h // rows.h, grid.w // rows.w
    scale = preprocess.rescale / torch.tensor(preprocess.std, dtype=torch.float64, device=pixels.device)
    moved = torch.ones(layout.frames, rows.area, dtype=torch.bool, device=pixels.device)
    frames = pixels.unflatten(0, (layout.frames, rows.h, down, rows.w, across)).unflatten(-1, (channels, -1))
    for number in range(1, layout.frames):  # sums of whole numbers are exact in float64, and so the same everywhere
        change = (frames[number].double() - frames[number - 1].double()).abs().mean((1, 3, 5)) @ scale / channels
        moved[number] = change.flatten() * 255 > STILL
    return moved


def _pieces(layout: ImageLayout, counts: list[int]) -> Iterator[Piece]:
    """The layout's, each placeholder with the rows that its frame keeps."""
    waiting = iter(counts)
    for piece in layout.pieces:
        yield ImagePlaceholder(next(waiting)) if isinstance(piece, ImagePlaceholder) else piece
