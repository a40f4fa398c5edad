"""The one resize: Pillow's, on 8-bit pixels, as the reference image processors do it.

Other libraries' filters of the same name differ by several grey levels (antialiasing, rounding of the weights).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from siglane.config.preprocess import Resample
from siglane.types import Size


def resize(rgb: npt.NDArray[np.uint8], size: Size, resample: Resample) -> npt.NDArray[np.uint8]:
    """rgb u8 `[H, W, 3]` -> u8 `[size.height, size.width, 3]`, read-only; `rgb` itself when it has that size."""
    if (size.height, size.width) == rgb.shape[:2]:
        return rgb
    return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling[resample.upper()]))
