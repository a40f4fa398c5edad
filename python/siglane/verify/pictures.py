"""The pictures a verification uses: files, URLs, Pillow images, or drawn ones of awkward shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from siglane.config.preprocess import LOCAL_DECODE, DecodeConfig
from siglane.image.decode import decode
from siglane.media.policy import LOCAL_MEDIA
from siglane.media.source import fetch, naming, open_file
from siglane.types import DecodedImage
from siglane.verify.stages import Picture

SEED = 0
LONGEST_NAME = 80
# no side a multiple of a patch, wide, tall and nearly square, then a strip and one pixel
SHAPES = ((317, 211), (97, 409), (231, 230), (1201, 37), (1, 1), (43, 1201))
# what the references do with transparent and 16-bit pictures, not what siglane serves (docs/model_facts.md)
REFERENCE_DECODE: DecodeConfig = replace(LOCAL_DECODE, alpha="drop", depth16="clip")

ImageSource = str | Path | bytes | Image.Image


def read_pictures(sources: Sequence[ImageSource]) -> tuple[Picture, ...]:
    """ImageError names the picture that cannot be read or decoded."""
    return tuple(_read(number, source) for number, source in enumerate(sources))


def draw_pictures(count: int) -> tuple[Picture, ...]:
    """Smooth colours, shapes with hard edges and noise, so that filters, order and positions all matter; always the
    same ones."""
    rng = np.random.default_rng(SEED)
    shapes = [*SHAPES, *(map(tuple, rng.integers(3, 700, (max(0, count - len(SHAPES)), 2)).tolist()))][:count]
    return tuple(
        picture_of(f"random {width}x{height}", _png(_drawn(width, height, np.random.default_rng((SEED, number)))))
        for number, (width, height) in enumerate(shapes)
    )


def picture_of(name: str, data: bytes) -> Picture:
    size = decode_picture(name, data).size
    return Picture(name, data, size.width, size.height)


def decode_picture(name: str, data: bytes) -> DecodedImage:
    """siglane's own decoding, with the references' switches."""
    with naming(name):
        return decode(data, REFERENCE_DECODE)


def thumbnail(picture: Picture, side: int = 320) -> bytes:
    """PNG, at most `side` pixels wide and high."""
    image = Image.fromarray(decode_picture(picture.name, picture.data).rgb)
    image.thumbnail((side, side))
    return _png(image)


def _read(number: int, source: ImageSource) -> Picture:
    if isinstance(source, Image.Image):
        return picture_of(f"image {number}", _png(source))
    if isinstance(source, bytes):
        return picture_of(f"image {number}", source)
    text = str(source)
    if text.lower().startswith("file:"):
        text = unquote(urlsplit(text).path)
    elif "://" in text or text.startswith("data:"):
        name = text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 3] + "..."
        with naming(name):
            data = fetch(text, LOCAL_MEDIA)
        return picture_of(name, data)
    with naming(text), open_file(text) as file:
        data = file.read()
    return picture_of(text, data)


def _drawn(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    phases = rng.uniform(0, 6, (3, 2))
    waves = [np.sin(x / 19 + phase) + np.cos(y / 23 + other) for phase, other in phases]
    colours = 110 + 45 * np.stack(waves, axis=-1)
    for _ in range(6):
        centre, radius = rng.uniform((0, 0), (width, height)), rng.uniform(4, 0.3 * max(width, height, 16))
        inside = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2
        colours[inside] = rng.uniform(0, 255, 3)
    return Image.fromarray(np.clip(colours + rng.normal(0, 8, colours.shape), 0, 255).astype(np.uint8))


def _png(image: Image.Image) -> bytes:
    stream = BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()
