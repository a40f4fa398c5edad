"""An upright picture -> the tiles the tower sees, drawn step by step as the layout says (tiling)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from siglane.errors import ImageError
from siglane.image.resize import resize, resize_in_float
from siglane.types import ImageLayout, Pad, Region, Resize, Step

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]


def render_tiles(
    frames: Sequence[npt.NDArray[np.uint8]], layout: ImageLayout, region: Region | None = None
) -> tuple[Pixels, ...]:
    """One `[H, W, 3]` view per tile of `layout`, in its order, u8 or (after a resize in float) f32, both 0..255.

    frames: u8 `[H, W, 3]`, one for a still picture. Each distinct sequence of steps is drawn once. A frame of another
    size than the first is brought to the first's canvas where the steps begin with a resize (Ovis resizes all frames to
    the first's target); elsewhere it is ImageError `frame_sizes_differ`. region: where in the one frame, which is
    smaller than the layout's source, the picture lies; all steps begin with a resize then. Raises ValueError when the
    layout was made for another picture size or number of frames.
    """
    height, width = frames[0].shape[:2]
    if (region is None and layout.source != (width, height)) or len(frames) != max(1, layout.frames):
        raise ValueError(f"the layout is for {layout.source}, the image is {(width, height)}, {len(frames)} frames")
    drawn: dict[tuple[int, tuple[Step, ...]], Pixels] = {}
    tiles = []
    for tile in layout.tiles:
        if frames[tile.frame].shape != frames[0].shape and not isinstance(next(iter(tile.steps), None), Resize):
            message = "the frames of the video have different sizes, which this model does not resize; send one size"
            raise ImageError(message, code="frame_sizes_differ")
        left, top, right, bottom = tile.box
        tiles.append(_draw(frames, tile.frame, tile.steps, drawn, region)[top:bottom, left:right])
    return tuple(tiles)


def _draw(
    frames: Sequence[npt.NDArray[np.uint8]],
    frame: int,
    steps: tuple[Step, ...],
    drawn: dict[tuple[int, tuple[Step, ...]], Pixels],
    region: Region | None,
) -> Pixels:
    """The canvas after `steps`; canvases that several tiles or longer sequences share are kept in `drawn`."""
    if not steps:
        return frames[frame]
    key = (frame, steps)
    if key not in drawn:
        before = _draw(frames, frame, steps[:-1], drawn, region)
        match steps[-1]:
            case Resize(size, resample, in_float=False) if len(steps) == 1:
                drawn[key] = resize(before, size, resample, region)
            case Resize(size, resample, in_float=True):
                drawn[key] = resize_in_float(before, size, resample)
            case Resize(size, resample):
                drawn[key] = resize(before, size, resample)
            case Pad() as step:
                drawn[key] = pad(before, step)
    return drawn[key]


def pad(pixels: Pixels, step: Pad) -> Pixels:
    """pixels `[H, W, 3]` in the middle of a canvas, as `step` says."""
    height, width = pixels.shape[:2]
    canvas = np.empty((step.size.height, step.size.width, 3), pixels.dtype)
    canvas[:] = step.fill
    canvas[step.top : step.top + height, step.left : step.left + width] = pixels
    return canvas
