"""Pictures and frames that a caller of a host's offline engine opened or decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from siglane.errors import UserError
from siglane.media.item import MediaItem


def opened_item(given: Any, where: str, *, video: bool) -> MediaItem:
    """given: a Pillow image or an 8-bit RGB array `[H, W, 3]`, several of them for a video. UserError for anything
    else: floats have a scale that nobody knows."""
    try:
        source = [_picture(frame) for frame in given] if video else _picture(given)
    except TypeError as error:
        message = f"{where}: siglane reads pictures, and 8-bit RGB arrays with height and width first, got {error}"
        raise UserError(message, code="unsupported_media") from error
    return MediaItem(source, where, video=video)


def are_frames(data: Any) -> bool:
    """Whether these are the frames of one video, not several videos."""
    if dimensions(data) == 4:
        return True
    pictures = isinstance(data, Sequence) and len(data) > 0
    return pictures and all(isinstance(one, Image.Image) or dimensions(one) == 3 for one in data)


def dimensions(data: Any) -> int:
    """Of an array or tensor; 0 of anything else."""
    return data.ndim if isinstance(data, np.ndarray | torch.Tensor) else 0


def _picture(given: Any) -> Image.Image:
    """TypeError says what is given instead of a picture."""
    if isinstance(given, Image.Image):
        return given
    array = given.cpu().numpy() if isinstance(given, torch.Tensor) else given
    if not isinstance(array, np.ndarray):
        raise TypeError(type(given).__name__)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise TypeError(f"{array.dtype} {list(array.shape)}")
    return Image.fromarray(array)
