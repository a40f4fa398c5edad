"""What a file is, by how it begins."""

from __future__ import annotations

import re
from base64 import urlsafe_b64decode
from typing import NamedTuple

SIGNATURE_BYTES = 64  # that are looked at


class Kind(NamedTuple):
    """What has `magic` behind its first `offset` bytes. picture: False of what is sent or stored in one's place."""

    offset: int
    magic: bytes
    name: str
    picture: bool = True


# the first that fits counts; of pictures Pillow alone decides what is decoded
KINDS = (
    Kind(0, b"\xff\xd8\xff", "JPEG"),
    Kind(0, b"\x89PNG", "PNG"),
    Kind(8, b"WEBP", "WEBP"),
    Kind(0, b"GIF8", "GIF"),
    Kind(0, b"BM", "BMP"),
    Kind(0, b"II*\0", "TIFF"),
    Kind(0, b"MM\0*", "TIFF"),
    Kind(4, b"ftypavi", "AVIF"),
    Kind(4, b"ftyphei", "HEIC"),
    Kind(4, b"ftypmif1", "HEIF"),
    Kind(0, b"\xff\x0a", "JPEG XL"),
    Kind(4, b"JXL ", "JPEG XL"),
    Kind(4, b"jP  ", "JPEG 2000"),
    Kind(0, b"\0\0\1\0", "ICO"),
    Kind(0, b"%PDF", "PDF"),
    Kind(0, b"%!PS", "EPS"),
    Kind(0, b"\xc5\xd0\xd3\xc6", "EPS"),
    Kind(0, b"8BPS", "PSD"),
    Kind(0, b"SIMPLE  =", "FITS"),
    Kind(0, b"\xd7\xcd\xc6\x9a", "WMF"),
    Kind(40, b" EMF", "EMF"),
    Kind(0, b"version https://git-lfs", "a Git LFS pointer, not the picture: run `git lfs pull`", picture=False),
    Kind(0, b"data:", "a data URL written into a file: decode it first", picture=False),
    Kind(4, b"ftyp", "a video, or another picture format", picture=False),
    Kind(0, b"\x1aE\xdf\xa3", "a video", picture=False),
    Kind(8, b"AVI ", "a video", picture=False),
    Kind(0, b"\x1f\x8b", "compressed by gzip", picture=False),
    Kind(0, b"PK\x03\x04", "a ZIP archive", picture=False),
)
MARKUP = Kind(0, b"<", "SVG or HTML")  # behind white space
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")


def kind_of(head: bytes) -> Kind | None:
    """Of a file, by its first `SIGNATURE_BYTES`; None for what is not known."""
    return next((kind for kind in KINDS if head.startswith(kind.magic, kind.offset)), None)


def format_of(head: bytes) -> str | None:
    """JPEG, PNG and so on; None for what is no picture, or of a kind that is not known."""
    kind = kind_of(head)
    return kind.name if kind and kind.picture else None


def format_in_base64(text: str) -> str | None:
    """What a file is whose bytes `text` holds in base64, without a data URL's head; None for a text of any other kind,
    too short for a picture or with white space."""
    text = text.strip()
    if len(text) < SIGNATURE_BYTES or not _BASE64.fullmatch(text):
        return None
    return format_of(urlsafe_b64decode(text[:SIGNATURE_BYTES].replace("+", "-").replace("/", "_")))
