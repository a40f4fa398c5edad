"""An upright picture -> the tiles the tower sees, where and as large as the layout says (config/tokens.py)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from siglane.config.preprocess import PreprocessConfig
from siglane.image.resize import resize
from siglane.types import DecodedImage, ImageLayout, Size


def render_tiles(
    image: DecodedImage, layout: ImageLayout, preprocess: PreprocessConfig
) -> tuple[npt.NDArray[np.uint8], ...]:
    """One u8 `[H, W, 3]` view per tile of `layout`, in its order. Each distinct canvas is resized once.

    Raises ValueError when the layout was made for another picture size.
    """
    if layout.source != image.size:
        raise ValueError(f"the layout is for {layout.source}, the image is {image.size}")
    canvases: dict[Size, npt.NDArray[np.uint8]] = {}
    tiles = []
    for tile in layout.tiles:
        if tile.canvas not in canvases:
            canvases[tile.canvas] = _canvas(image.rgb, tile.canvas, preprocess, tiled=len(layout.tiles) > 1)
        left, top, right, bottom = tile.box
        tiles.append(canvases[tile.canvas][top:bottom, left:right])
    return tuple(tiles)


def _canvas(
    rgb: npt.NDArray[np.uint8], size: Size, preprocess: PreprocessConfig, *, tiled: bool
) -> npt.NDArray[np.uint8]:
    if tiled:  # VILA resizes a tiled picture with Pillow's default, whatever its processor is told
        return resize(rgb, size, "bicubic")
    if preprocess.tiling == "pad":
        rgb = _pad_to_square(rgb, preprocess.mean)
    return resize(rgb, size, preprocess.resample)


def _pad_to_square(rgb: npt.NDArray[np.uint8], mean: tuple[float, float, float]) -> npt.NDArray[np.uint8]:
    height, width = rgb.shape[:2]
    side = max(height, width)
    if height == width:
        return rgb
    top, left = (side - height) // 2, (side - width) // 2
    square = np.empty((side, side, 3), np.uint8)
    square[:] = [int(channel * 255) for channel in mean]
    square[top : top + height, left : left + width] = rgb
    return square
