"""Pictures with the spectrum of photographs, for what depends on how much detail a picture has."""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image


@cache  # a megapixel takes a quarter of a second
def photograph(width: int, height: int, *, exponent: float = 1.0, seed: int = 0) -> Image.Image:
    """Noise whose amplitudes fall with their frequency to the power of `exponent`, as those of photographs do (Field
    1987: 1 on average, less detail above it); brightness varies most, colours less."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    shape = frequency.shape
    channels = []
    for _ in range(3):
        waves = (random.normal(size=shape) + 1j * random.normal(size=shape)) / frequency**exponent
        field = np.fft.irfft2(waves, s=(height, width))
        channels.append((field - field.mean()) / field.std())
    grey, red, blue = channels
    colours = np.stack([grey + 0.3 * red, grey, grey + 0.3 * blue], axis=-1)
    return Image.fromarray(np.clip(128 + 45 * colours, 0, 255).astype(np.uint8))
