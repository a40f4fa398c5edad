"""Small picture files written by hand, field by field, from the formats' standards: nothing here knows Pillow."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.integer]

# --- PNG ------------------------------------------------------------------------------------------------------------

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def chunk(kind: bytes, body: bytes, *, bad_crc: bool = False) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ bad_crc)


def png_rows(samples: Samples, depth: int) -> bytes:
    """Filtered rows; every second one is stored as its difference to the one above."""
    rows, before = [], None
    for number, row in enumerate(samples.reshape(len(samples), -1)):
        if depth == 16:
            stored = row.astype(">u2").tobytes()
        elif depth == 8:
            stored = row.astype(np.uint8).tobytes()
        else:
            bits = row[:, None] >> np.arange(depth - 1, -1, -1) & 1
            stored = np.packbits(bits.astype(np.uint8)).tobytes()
        now = np.frombuffer(stored, np.uint8)
        rows.append(b"\2" + (now - before).tobytes() if number % 2 and before is not None else b"\0" + stored)
        before = now
    return b"".join(rows)


def png_parts(samples: Samples, depth: int, colour: int, *, interlaced: bool = False) -> tuple[bytes, bytes]:
    """IHDR, and the compressed pixels. samples: `[H, W]` or `[H, W, channels]`."""
    height, width = samples.shape[:2]
    if interlaced:
        passes = (samples[y::down, x::right] for x, y, right, down in ADAM7)
        rows = b"".join(png_rows(part, depth) for part in passes if part.size)
    else:
        rows = png_rows(samples, depth)
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)), zlib.compress(rows)


def png(
    samples: Samples, depth: int, colour: int, *before: bytes, interlaced: bool = False, after: Iterable[bytes] = ()
) -> bytes:
    """before, after: chunks around the pixels."""
    head, pixels = png_parts(samples, depth, colour, interlaced=interlaced)
    return b"".join((PNG_SIGNATURE, head, *before, chunk(b"IDAT", pixels), *after, chunk(b"IEND", b"")))


# --- EXIF -----------------------------------------------------------------------------------------------------------


def exif(orientation: int, order: str = "<", kind: int = 3, count: int = 1) -> bytes:
    """A TIFF header and one directory with two entries, the orientation last."""
    value = struct.pack(f"{order}HH", orientation, 0) if kind == 3 else struct.pack(f"{order}I", orientation)
    entries = struct.pack(f"{order}HHII", 0x0100, 4, 1, 77) + struct.pack(f"{order}HHI", 0x0112, kind, count) + value
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(f"{order}IH", 8, 2) + entries + bytes(4)


# --- BMP ------------------------------------------------------------------------------------------------------------


def bmp(
    width: int, height: int, bits: int, pixels: bytes, *, info: int = 40, compression: int = 0,
    masks: Sequence[int] = (), palette: bytes = b"", colours: int = 0, gap: int = 0,
) -> bytes:  # fmt: skip
    """info: bytes of the header; masks go into it where it has room, else behind it."""
    if info == 12:
        head = struct.pack("<IHHHH", info, width, height, 1, bits)
    else:
        fields = (info, width, height, 1, bits, compression, len(pixels), 2835, 2835, colours, 0)
        stated = b"".join(struct.pack("<I", mask) for mask in masks)
        head = struct.pack("<IiiHHIIiiII", *fields) + (stated if info > 40 else b"")
        head = head[:info].ljust(info, b"\0") + (stated if info == 40 else b"")
    body = head + palette + bytes(gap)
    return b"BM" + struct.pack("<IHHI", 14 + len(body) + len(pixels), 0, 0, 14 + len(body)) + body + pixels


def bmp_rows(values: Samples, sample: int) -> bytes:
    """Rows of `[H, W]` numbers of `sample` bytes, the lowest first, each to a multiple of four bytes."""
    rows = (row.astype(f"<u{sample}").tobytes() for row in values[::-1])
    return b"".join(row + bytes(-len(row) % 4) for row in rows)


# --- GIF ------------------------------------------------------------------------------------------------------------


def lzw(indices: Sequence[int], bits: int = 2) -> bytes:
    """Codes that never grow, because the table is cleared in time; in sub-blocks."""
    clear = 1 << bits
    codes: list[int] = []
    for number, index in enumerate(indices):
        if number % (clear - 2) == 0:
            codes.append(clear)
        codes.append(index)
    whole = sum(code << (bits + 1) * place for place, code in enumerate([*codes, clear + 1]))
    data = whole.to_bytes(-(-(bits + 1) * (len(codes) + 1) // 8), "little")
    blocks = (data[start : start + 255] for start in range(0, len(data), 255))
    return bytes((bits,)) + b"".join(bytes((len(block),)) + block for block in blocks) + b"\0"


def gif(screen: tuple[int, int], *parts: bytes, palette: bytes = b"", background: int = 0) -> bytes:
    flags = 0x80 | (len(palette) // 3).bit_length() - 2 if palette else 0
    return b"GIF89a" + struct.pack("<HHBBB", *screen, flags, background, 0) + palette + b"".join(parts) + b";"


def gif_image(
    box: tuple[int, int, int, int], indices: Sequence[int], palette: bytes = b"", *, interlaced: bool = False
) -> bytes:
    flags = 0x80 | (len(palette) // 3).bit_length() - 2 if palette else 0
    return b"," + struct.pack("<HHHHB", *box, flags | interlaced << 6) + palette + lzw(indices)


def gif_control(transparent: int | None = None, disposal: int = 0) -> bytes:
    return b"!\xf9\x04" + struct.pack("<BHBB", disposal << 2 | (transparent is not None), 10, transparent or 0, 0)


# --- WebP, JPEG, TIFF -----------------------------------------------------------------------------------------------


def riff_chunk(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


def riff(*chunks: bytes, size: int | None = None) -> bytes:
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body) if size is None else size) + body


def riff_chunks(data: bytes) -> dict[bytes, bytes]:
    """Bodies by kind."""
    found, place = {}, 12
    while place < len(data):
        kind, length = struct.unpack_from("<4sI", data, place)
        found[kind] = data[place + 8 : place + 8 + length]
        place += 8 + length + length % 2
    return found


def vp8x(width: int, height: int, flags: int) -> bytes:
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return riff_chunk(b"VP8X", bytes((flags, 0, 0, 0)) + sizes)


def segment(marker: int, body: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


Tags = dict[int, tuple[int, Sequence[int] | bytes]]
TIFF_TYPES = {1: "B", 3: "H", 4: "I", 7: "B"}


def tiff(width: int, height: int, tags: Tags, pixels: bytes, order: str = "<") -> bytes:
    """One strip, not compressed. tags: number to (type, values)."""
    usual: Tags = {
        256: (3, [width]),
        257: (3, [height]),
        259: (3, [1]),
        273: (4, [0]),
        278: (3, [height]),
        279: (4, [len(pixels)]),
    }
    bodies = {}
    for tag, (kind, values) in (usual | tags).items():
        packed = (
            values if isinstance(values, bytes) else struct.pack(f"{order}{len(values)}{TIFF_TYPES[kind]}", *values)
        )
        bodies[tag] = (kind, len(values), packed)
    start = 8 + 2 + 12 * len(bodies) + 4
    end = start + sum(len(packed) + len(packed) % 2 for _, _, packed in bodies.values() if len(packed) > 4)
    bodies[273] = (4, 1, struct.pack(f"{order}I", end))
    directory, outside = struct.pack(f"{order}H", len(bodies)), b""
    for tag, (kind, count, packed) in sorted(bodies.items()):
        place = struct.pack(f"{order}I", start + len(outside)) if len(packed) > 4 else packed.ljust(4, b"\0")
        directory += struct.pack(f"{order}HHI", tag, kind, count) + place
        outside += packed + bytes(len(packed) % 2) if len(packed) > 4 else b""
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(f"{order}I", 8) + directory + bytes(4) + outside + pixels
