"""JPEG files (ITU-T T.81): what makes the picture of one, and nothing else, goes to Pillow.

Pillow reads application segments (JFIF, EXIF, ICC, Photoshop, multi-picture) eagerly and refuses a picture whose
segments are odd. Decoding needs two of them: JFIF's and Adobe's, which say what the components mean.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from io import SEEK_CUR, BytesIO
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from siglane.image.header import UPRIGHT, Header, orientation_of
from siglane.types import Size

logger = logging.getLogger(__name__)

_START, _SCAN, _END = 0xD8, 0xDA, 0xD9
_BARE = {0x01, *range(0xD0, 0xD9)}  # markers without a segment: TEM, RST0-7, SOI
_TABLES = {0xC4, 0xCC, 0xDB, 0xDD}  # DHT, DAC, DQT, DRI
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_APP0, _EXIF, _ADOBE = 0xE0, 0xE1, 0xEE
_YCBCR = 1  # Adobe's transform
_MOST_SEGMENTS = 100_000  # a file of empty ones must not keep a core busy
_BLOCK = 4096
_FOLLOWING = (b"", b"\x55" * 64, b"\xaa" * 64)  # a decoder reads zeros where there is nothing


def read_header(file: BinaryIO) -> Header:
    """Reads the segments up to the first scan. ValueError without a frame header."""
    size, orientation = None, None
    for marker, body in _segments(file):
        if marker in _FRAMES and size is None and len(body) >= 5:
            size = Size(int.from_bytes(body[3:5], "big"), int.from_bytes(body[1:3], "big"))
        elif marker == _EXIF and orientation is None and body.startswith(b"Exif\0"):
            orientation = orientation_of(body)
    if size is None:
        raise ValueError("no frame header")
    return Header(size, orientation or UPRIGHT)


def open_image(file: BinaryIO, shrink: int = 1) -> Image.Image:
    """The picture, not yet decoded; shrink: 2, 4 or 8 for a picture of that fraction of its size (`reduced_size`).
    Raises almost anything on damaged files."""
    data, ended, _ = _needed(file)
    return _opened(data, shrink) if ended else _without_end(data.rstrip(b"\xff"), shrink)


def read_pixels(file: BinaryIO) -> npt.NDArray[np.uint8] | None:
    """The pixels, u8 `[H, W, 3]`, by simplejpeg; None where it is not installed or Pillow has to decide: for a kind of
    JPEG that is rare, or damaged in any way."""
    if (decoder := _decoder()) is None:
        return None
    data, ended, usual = _needed(file)
    if not (ended and usual):
        return None
    try:
        found: npt.NDArray[np.uint8] = decoder(data)
    except Exception:  # a bare ValueError for all that libjpeg says
        return None
    return found


@lru_cache
def _decoder() -> Callable[[bytes], npt.NDArray[np.uint8]] | None:
    """simplejpeg's, where it decodes as Pillow does to the last bit: both have a libjpeg of their own."""
    try:
        from simplejpeg import decode_jpeg
    except ImportError:
        return None
    decoder = partial(decode_jpeg, colorspace="RGB", fastdct=False, fastupsample=False, strict=True)
    noise = np.random.default_rng(0).integers(0, 256, (37, 51, 3), np.uint8)
    for options in ({"subsampling": 2}, {"subsampling": 1}, {"subsampling": 0, "progressive": True}):
        buffer = BytesIO()
        Image.fromarray(noise).save(buffer, "JPEG", **options)
        if not np.array_equal(decoder(buffer.getvalue()), np.asarray(_opened(buffer.getvalue(), 1))):
            logger.warning("simplejpeg decodes other pixels than Pillow here, and is not used")
            return None
    return decoder


def _needed(file: BinaryIO) -> tuple[bytes, bool, bool]:
    """The segments that make the picture and its scans; whether its end is marked; and whether it is of the usual kind,
    8 bits of grey or of JFIF's or Adobe's YCbCr."""
    kept, bits, components, says = [bytes((0xFF, _START))], 0, 0, False
    for marker, body in _segments(file):
        colours = _says_colours(marker, body)
        if marker in _TABLES or marker in _FRAMES or marker == _SCAN or colours:
            kept.append(bytes((0xFF, marker)) + (len(body) + 2).to_bytes(2, "big") + body)
        if marker in _FRAMES and len(body) >= 6:
            bits, components = body[0], body[5]
        if colours:
            says = marker == _APP0 or body[11] == _YCBCR
    kept.append(scans := file.read())
    # elsewhere than at its end a scan cannot hold these bytes
    ended = bytes((0xFF, _END)) in scans
    return b"".join(kept), ended, bits == 8 and (components == 1 or (components == 3 and says))


def _without_end(data: bytes, shrink: int) -> Image.Image:
    """A file that was cut behind its pixels has them all: whatever follows, the picture is the same. ValueError for one
    that was cut amid them, of which a decoder would show what it likes."""
    one, *others = (_opened(data + more + bytes((0xFF, _END)), shrink) for more in _FOLLOWING)
    if any(other.tobytes() != one.tobytes() for other in others):
        raise ValueError("pixels are missing")
    return one


def _opened(data: bytes, shrink: int) -> Image.Image:
    image = Image.open(BytesIO(data), formats=("JPEG",))
    if shrink > 1:  # of the fractions that leave at least this size Pillow takes the smallest
        image.draft(None, Size(image.width // shrink, image.height // shrink))
    return image


def _says_colours(marker: int, body: bytes) -> bool:
    return (marker == _APP0 and body.startswith(b"JFIF\0") and len(body) >= 14) or (
        marker == _ADOBE and body.startswith(b"Adobe") and len(body) >= 12
    )


def _segments(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Marker and body of each segment up to the first scan's header, that included; the file then stands behind it."""
    for _ in range(_MOST_SEGMENTS):
        marker = _next_marker(file)
        if marker in _BARE:
            continue
        if marker is None or marker == _END:
            return
        body = file.read(max(0, int.from_bytes(file.read(2), "big") - 2))
        yield marker, body
        if marker == _SCAN:
            return
    raise ValueError("too many segments")


def _next_marker(file: BinaryIO) -> int | None:
    """Steps over what is no marker, as decoders do; None at the end."""
    while block := file.read(_BLOCK):
        start = block.find(b"\xff")
        if start < 0:
            continue
        rest = block[start:].lstrip(b"\xff")
        file.seek(-len(rest), SEEK_CUR)
        marker = file.read(1)
        if marker == b"\xff":  # the block ended amid fill bytes
            file.seek(-1, SEEK_CUR)
        elif marker not in (b"", b"\0"):
            return marker[0]
    return None
