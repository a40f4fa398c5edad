"""Resizing as the reference image processors do it: Pillow's filters on 8-bit pixels, or torch's on float tensors.

Other libraries' filters of the same name differ by several grey levels (antialiasing, rounding of the weights).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from siglane.types import Region, Resample, Size


def resize(
    pixels: npt.NDArray[Any], size: Size, resample: Resample, region: Region | None = None
) -> npt.NDArray[np.uint8]:
    """pixels u8 `[H, W, 3]` -> u8 `[size.height, size.width, 3]`, read-only; `pixels` itself when it has that size.
    region: the part that is resized, all where it is None.

    ValueError for float pixels, which Pillow would have to round.
    """
    if pixels.dtype != np.uint8:
        raise ValueError("Pillow resizes 8-bit pixels; the layout puts a resize behind one in float")
    if region is None and (size.height, size.width) == pixels.shape[:2]:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling[resample.upper()], region))


def resize_in_float(pixels: npt.NDArray[Any], size: Size, resample: Resample) -> npt.NDArray[np.float32]:
    """pixels `[H, W, 3]` on the scale 0..255 -> f32 `[size.height, size.width, 3]`, antialiased, not rounded.

    As torchvision's `resize` on a float tensor, which is torch's antialiased `interpolate`.
    """
    import torch
    import torch.nn.functional as F

    if resample not in ("bilinear", "bicubic"):
        raise ValueError(f"torch resizes tensors with bilinear or bicubic filters, not {resample}")
    picture = torch.from_numpy(np.array(pixels, np.float32)).permute(2, 0, 1)[None]
    if (size.height, size.width) != pixels.shape[:2]:
        picture = F.interpolate(
            picture, size=(size.height, size.width), mode=resample, align_corners=False, antialias=True
        )
    found: npt.NDArray[np.float32] = picture[0].permute(1, 2, 0).contiguous().numpy()
    return found
