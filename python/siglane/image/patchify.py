"""Tiles -> rows of patches, not yet normalised; and the two vectors that normalise them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from siglane.config.preprocess import PreprocessConfig
from siglane.config.vision import PatchLayout, VisionConfig
from siglane.errors import ConfigError
from siglane.image.still import settled
from siglane.image.tile import Pixels, render_tiles
from siglane.types import DecodedImage, DecodedVideo, ImageLayout, ImagePatches, ReducedImage, digest_of


def to_patches(
    image: DecodedImage | ReducedImage | DecodedVideo,
    layout: ImageLayout,
    preprocess: PreprocessConfig,
    vision: VisionConfig,
) -> ImagePatches:
    """What the tower needs of one image or video: `[layout.patches, vision.patch_dim]` on the host, and its identity.

    The patches' layout is `layout`, settled where pixels have a say in it (`image/still.py`). Raises ValueError when it
    was made for another picture size, number of frames or patch size.
    """
    frames = image.frames if isinstance(image, DecodedVideo) else (image.rgb,)
    region = image.region if isinstance(image, ReducedImage) else None
    if isinstance(image, ReducedImage) and image.size != layout.source:
        raise ValueError(f"the layout is for {layout.source}, the image is {image.size}")
    pixels = patchify(render_tiles(frames, layout, region), vision.patch_size, vision.patch_layout)
    options = repr((preprocess, layout, vision.patch_size, vision.patch_layout))
    digest = digest_of(b"siglane.patches", image.digest, options.encode())
    if layout.frames:
        layout = settled(layout, pixels, preprocess)
    return ImagePatches(pixels, layout, digest)


def patchify(tiles: Sequence[Pixels], patch_size: int, patch_layout: PatchLayout) -> torch.Tensor:
    """`[H, W, 3]` tiles -> `[patches, 3 * patch_size**2]`, tile after tile, raster order inside a tile.

    u8 when every tile is, else f32. A row holds its patch as (channel, y, x) or (y, x, channel). Rows and columns
    beyond the last whole patch are never read: 384 pixels hold 27 patches of 14.
    """
    p = patch_size
    grids = [(tile.shape[0] // p, tile.shape[1] // p) for tile in tiles]
    dtype = torch.uint8 if all(tile.dtype == np.uint8 for tile in tiles) else torch.float32
    pixels = torch.empty(sum(h * w for h, w in grids), 3 * p * p, dtype=dtype)
    start = 0
    for tile, (h, w) in zip(tiles, grids, strict=True):
        rows = pixels[start : start + h * w].numpy()
        patches = tile[: h * p, : w * p].reshape(h, p, w, p, 3)  # a view: splitting axes needs no copy
        if patch_layout == "channel_first":
            rows.reshape(h, w, 3, p, p)[:] = patches.transpose(0, 2, 4, 1, 3)
        else:
            rows.reshape(h, w, p, p, 3)[:] = patches.transpose(0, 2, 1, 3, 4)
        start += h * w
    return pixels


def normalisation(preprocess: PreprocessConfig, vision: VisionConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """scale and shift, f32 `[patch_dim]`: `pixel * scale + shift == (pixel * rescale - mean) / std` in patch layout."""
    if vision.num_channels != 3:
        raise ConfigError(f"vision num_channels {vision.num_channels} is not supported; pictures have 3")
    std = torch.tensor(preprocess.std, dtype=torch.float64)
    scale, shift = preprocess.rescale / std, -torch.tensor(preprocess.mean, dtype=torch.float64) / std
    area = vision.patch_size**2
    if vision.patch_layout == "channel_first":
        return scale.repeat_interleave(area).float(), shift.repeat_interleave(area).float()
    return scale.repeat(area).float(), shift.repeat(area).float()
