"""JPEG files (ITU-T T.81): what makes the picture of one, and nothing else, goes to Pillow.

Pillow reads application segments (JFIF, EXIF, ICC, Photoshop, multi-picture) eagerly and refuses a picture whose
segments are odd. Decoding needs two of them: JFIF's and Adobe's, which say what the components mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import SEEK_CUR, BytesIO
from typing import BinaryIO

from PIL import Image

from siglane.image.header import UPRIGHT, Header, orientation_of
from siglane.types import Size

_START, _SCAN, _END = 0xD8, 0xDA, 0xD9
_BARE = {0x01, *range(0xD0, 0xD9)}  # markers without a segment: TEM, RST0-7, SOI
_TABLES = {0xC4, 0xCC, 0xDB, 0xDD}  # DHT, DAC, DQT, DRI
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_APP0, _EXIF, _ADOBE = 0xE0, 0xE1, 0xEE
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
    kept = [bytes((0xFF, _START))]
    for marker, body in _segments(file):
        if marker in _TABLES or marker in _FRAMES or marker == _SCAN or _says_colours(marker, body):
            kept.append(bytes((0xFF, marker)) + (len(body) + 2).to_bytes(2, "big") + body)
    kept.append(scans := file.read())
    if bytes((0xFF, _END)) not in scans:  # elsewhere than at its end a scan cannot hold these bytes
        return _without_end(b"".join(kept).rstrip(b"\xff"), shrink)
    return _opened(b"".join(kept), shrink)


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
