"""What a picture's file says before its pixels: the size, and which way up it was taken."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from siglane.types import Size

UPRIGHT = 1
_ORIENTATION, _SHORT = 0x0112, 3
_ENTRY_BYTES = 12
_SIDEWAYS = (5, 6, 7, 8)


@dataclass(frozen=True, slots=True)
class Header:
    """stored: size of the pixels as they lie in the file; orientation: 1 to 8, as EXIF counts."""

    stored: Size
    orientation: int = UPRIGHT

    @property
    def upright(self) -> Size:
        width, height = self.stored
        return Size(height, width) if self.orientation in _SIDEWAYS else self.stored


def header_of(size: Size | None, exif: bytes) -> Header:
    """exif: b"" without any. ValueError without a size."""
    if size is None:
        raise ValueError("the file states no size")
    return Header(size, orientation_of(exif))


def orientation_of(exif: bytes) -> int:
    """The orientation that EXIF data state, 1 where they state none that exists (EXIF 3.0, 4.6.5.1.6).

    Nothing else of the data is read, and they may end anywhere: what is broken in them does not matter. Like browsers
    and FFmpeg, it takes the tag as one 16-bit number only.
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return UPRIGHT
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    if start + 2 > len(tiff):
        return UPRIGHT
    (entries,) = struct.unpack_from(f"{order}H", tiff, start)
    for number in range(entries):
        place = start + 2 + _ENTRY_BYTES * number
        if place + _ENTRY_BYTES > len(tiff):
            break
        tag, kind, count, value = struct.unpack_from(f"{order}HHIH", tiff, place)
        if tag == _ORIENTATION:
            return value if kind == _SHORT and count == 1 and 1 <= value <= 8 else UPRIGHT
    return UPRIGHT
