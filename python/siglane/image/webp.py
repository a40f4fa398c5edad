"""WebP files (RFC 9649): what makes the picture of one, and nothing else, goes to libwebp.

libwebp refuses a file whose RIFF size is wrong, whose flags promise chunks that are not there, or whose metadata end
early.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from io import BytesIO
from typing import BinaryIO

from PIL import Image

from siglane.image.header import Header, header_of
from siglane.types import Size

_HEAD_BYTES = 12
_ANIMATED, _ALPHA = 0x02, 0x10
_MOST_CHUNKS = 100_000
_MOST_EXIF = 1 << 20


def read_header(file: BinaryIO) -> Header:
    """Reads the chunks' heads, the canvas or the bitstream's size, and EXIF data. ValueError without a size."""
    if not file.read(_HEAD_BYTES).startswith(b"RIFF"):
        raise ValueError("no RIFF file")
    size, exif = None, b""
    for kind, length in _chunks(file):
        if size is None:
            size = _size(kind, file.read(min(length, 10)))
        elif kind == b"EXIF" and not exif:
            exif = file.read(min(length, _MOST_EXIF))
    return header_of(size, exif)


def open_image(file: BinaryIO) -> Image.Image:
    """The picture or animation, not yet decoded. Raises almost anything on damaged files.

    Of an animation a frame is what it shows: on a canvas that is transparent where nothing was drawn.
    """
    canvas, frames = b"", []
    found: dict[bytes, bytes] = {}
    for kind, length in _chunks(file):
        if kind == b"VP8X" and not canvas:
            canvas = file.read(length)[4:10]
        elif kind in (b"VP8 ", b"VP8L", b"ALPH", b"ANIM") and kind not in found:
            found[kind] = _chunk(kind, length, file.read(length))
        elif kind == b"ANMF":
            frames.append(_chunk(kind, length, file.read(length)))
    if frames:
        chunks = [_canvas(canvas, _ANIMATED | _ALPHA), found.get(b"ANIM", _chunk(b"ANIM", 6, bytes(6))), *frames]
    elif b"ALPH" in found and b"VP8 " in found:
        chunks = [_canvas(canvas, _ALPHA), found[b"ALPH"], found[b"VP8 "]]
    else:
        chunks = [found.get(b"VP8 ", b"") or found[b"VP8L"]]
    body = b"WEBP" + b"".join(chunks)
    return Image.open(BytesIO(b"RIFF" + struct.pack("<I", len(body)) + body), formats=("WEBP",))


def duration(file: BinaryIO) -> float:
    """Seconds that an animation takes, 0 where it states none."""
    frames = (file.read(15) for kind, _ in _chunks(file) if kind == b"ANMF")
    return sum(int.from_bytes(head[12:15], "little") for head in frames) / 1000


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Kind and length of each chunk up to the file's end; the file then stands at the chunk's body."""
    place = _HEAD_BYTES
    for _ in range(_MOST_CHUNKS):
        file.seek(place)
        head = file.read(8)
        if len(head) < 8:
            return
        kind, length = struct.unpack("<4sI", head)
        yield kind, length
        place += 8 + length + length % 2


def _size(kind: bytes, head: bytes) -> Size | None:
    """Of a chunk that says how large the picture is, from its first 10 bytes."""
    if kind == b"VP8X" and len(head) == 10:
        return Size(1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little"))
    if kind == b"VP8 " and len(head) == 10:
        width, height = struct.unpack_from("<HH", head, 6)
        return Size(width & 0x3FFF, height & 0x3FFF)
    if kind == b"VP8L" and len(head) >= 5:
        bits = int.from_bytes(head[1:5], "little")
        return Size(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    return None


def _canvas(size: bytes, flags: int) -> bytes:
    return _chunk(b"VP8X", 10, bytes((flags, 0, 0, 0)) + size)


def _chunk(kind: bytes, length: int, body: bytes) -> bytes:
    """length: as the file states it; a body that ends early must not pass for a whole one."""
    return kind + struct.pack("<I", length) + body + bytes(length % 2 if len(body) == length else 0)
