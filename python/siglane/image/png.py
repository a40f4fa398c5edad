"""PNG files (W3C, PNG third edition): what makes the picture of one, and nothing else, goes to Pillow.

Pillow inflates texts and profiles and refuses a picture whose metadata are large, damaged or out of place. None of
them changes a pixel, so they are stepped over: neither read nor inflated nor checked.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from io import SEEK_CUR, SEEK_SET, BytesIO
from typing import BinaryIO

import numpy as np
from PIL import Image

from siglane.image.header import Header, header_of
from siglane.types import Size

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _RGB, _PALETTE = 0, 2, 3
_MOST_CHUNKS = 100_000  # besides those with pixels; a file of empty ones must not keep a core busy
_MOST_EXIF = 1 << 20


def read_header(file: BinaryIO) -> Header:
    """Reads the chunks' heads, IHDR and eXIf, which may stand behind the pixels. ValueError without an IHDR."""
    size, exif = None, b""
    for kind, length in _chunks(file):
        if kind == b"IHDR" and size is None and length >= 8:
            size = Size(*struct.unpack(">II", file.read(8)))
        elif kind == b"eXIf" and not exif:
            exif = file.read(min(length, _MOST_EXIF))
    return header_of(size, exif)


def open_image(file: BinaryIO) -> Image.Image:
    """The picture, not yet decoded: of an animation the default image. Raises almost anything on damaged files.

    Its `info` holds nothing but the transparency, in values of the image.
    """
    kept: dict[bytes, bytes] = {}
    pixels, transparency = [], b""
    for kind, length in _chunks(file):
        if kind == b"IDAT":
            pixels.append(_whole(file, length))
        elif kind in (b"IHDR", b"PLTE") and kind not in kept and not pixels:
            kept[kind] = _whole(file, length)
        elif kind == b"tRNS" and not transparency and not pixels and _is_placed(kept):
            transparency = file.read(min(length, 256))
    head = kept[b"IHDR"]
    depth, colour = head[16], head[17]
    if not _is_placed(kept):
        raise ValueError("no palette")
    if colour != _PALETTE:
        kept.pop(b"PLTE", None)  # a suggestion
    data = b"".join((SIGNATURE, head, kept.get(b"PLTE", b""), *pixels))  # no end: a piece may be cut
    image = Image.open(BytesIO(data), formats=("PNG",))
    samples = {_GREY: 1, _RGB: 3}.get(colour)
    if colour == _PALETTE and transparency:
        image.info["transparency"] = transparency
    elif samples is not None and len(transparency) == 2 * samples:
        values = tuple(value & ((1 << depth) - 1) for value in struct.unpack(f">{samples}H", transparency))
        if (depth, colour) == (16, _RGB):
            return _transparent_rgb16(image, data, values)
        # Pillow gives grey of 1, 2 and 4 bits on the scale of 8
        scaled = [value * (255 // ((1 << depth) - 1)) if depth < 8 else value for value in values]
        image.info["transparency"] = scaled[0] if samples == 1 else tuple(scaled)
    return image


def _is_placed(before: Mapping[bytes, bytes]) -> bool:
    """Whether transparency after these chunks has something to speak of: the palette of a picture with one."""
    return b"PLTE" in before or (b"IHDR" in before and before[b"IHDR"][17] != _PALETTE)


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Kind and length of each chunk up to IEND or the file's end; the file then stands at the chunk's body."""
    place = len(SIGNATURE)
    others = 0
    while others <= _MOST_CHUNKS:
        file.seek(place, SEEK_SET)
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IEND":
            return
        length = int.from_bytes(head[:4], "big")
        others += head[4:] != b"IDAT" or not length
        yield head[4:], length
        place += length + 12
    raise ValueError("too many chunks")


def _whole(file: BinaryIO, length: int) -> bytes:
    """The chunk with its length and checksum, as far as the file goes."""
    file.seek(-8, SEEK_CUR)
    return file.read(length + 12)


def _transparent_rgb16(image: Image.Image, data: bytes, colour: tuple[int, ...]) -> Image.Image:
    """RGBA, transparent where all 16 bits of all samples are the colour's. Pillow keeps the upper 8 bits alone, so the
    lower ones are decoded by themselves: read in the other byte order."""
    lower = Image.open(BytesIO(data), formats=("PNG",))
    lower.tile = [tile._replace(args="RGB;16L") for tile in lower.tile]
    upper_bytes, lower_bytes = np.asarray(image), np.asarray(lower)
    equal = np.ones(upper_bytes.shape[:2], bool)
    for channel, value in enumerate(colour):
        equal &= (upper_bytes[..., channel] == value >> 8) & (lower_bytes[..., channel] == value & 255)
    alpha = np.where(equal, 0, 255).astype(np.uint8)
    return Image.fromarray(np.dstack([upper_bytes, alpha]))
