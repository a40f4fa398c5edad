"""BMP files (Microsoft's BITMAPINFOHEADER to BITMAPV5HEADER, IBM's OS/2 headers).

Pillow reads palettes and 24 bits. What it refuses or reads by another rule is done here: colour masks, alpha, run
lengths that leave pixels out, short OS/2 headers. Alpha counts as in browsers: only where the header has a mask for it,
and not where it is 0 in every pixel, as writers leave it that do not use it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from siglane.image.header import Header
from siglane.types import Size

_FILE_BYTES, _INFO_BYTES, _CORE_BYTES = 14, 40, 12
_OS2_BYTES = (*range(16, 65, 4), 42, 46)
_WITH_MASKS, _WITH_ALPHA = (52, 56, 108, 124), (56, 108, 124)
_KNOWN_TO_PILLOW = (_CORE_BYTES, _INFO_BYTES, 64, *_WITH_MASKS)
_RGB, _RLE8, _RLE4, _BITFIELDS, _ALPHA_BITFIELDS = 0, 1, 2, 3, 6
_MASKS = {16: (0x7C00, 0x3E0, 0x1F), 32: (0xFF0000, 0xFF00, 0xFF)}
_END_OF_LINE, _END_OF_BITMAP, _DELTA = 0, 1, 2


@dataclass(frozen=True, slots=True)
class _Bitmap:
    """info: the header after its size, at least to the number of colours; goes_down: the first row is the upper one;
    masks: of red, green, blue and alpha, 0 for none; offset: of the pixels in the file."""

    info_bytes: int
    info: bytes
    size: Size
    goes_down: bool
    bits: int
    compression: int
    colours: int
    masks: tuple[int, ...]
    offset: int


def read_header(file: BinaryIO) -> Header:
    """Reads the headers. Raises ValueError or struct.error where they are broken."""
    return Header(_read(file).size)


def open_image(file: BinaryIO) -> Image.Image:
    """The picture; already decoded where Pillow would not. Raises almost anything on damaged files."""
    bitmap = _read(file)
    if bitmap.bits in _MASKS and bitmap.compression in (_RGB, _BITFIELDS, _ALPHA_BITFIELDS):
        file.seek(bitmap.offset)
        return Image.fromarray(_masked(bitmap, file))
    if (bitmap.bits, bitmap.compression) in ((8, _RLE8), (4, _RLE4)):
        return _run_lengths(bitmap, file)
    file.seek(0)
    data = file.read()
    if bitmap.info_bytes not in _KNOWN_TO_PILLOW:
        offset = bitmap.offset + _INFO_BYTES - bitmap.info_bytes
        head = data[:10] + struct.pack("<II", offset, _INFO_BYTES) + bitmap.info[: _INFO_BYTES - 4]
        data = head + data[_FILE_BYTES + bitmap.info_bytes :]
    return Image.open(BytesIO(data), formats=("BMP",))


def _read(file: BinaryIO) -> _Bitmap:
    """The file then stands behind the headers."""
    (offset,) = struct.unpack_from("<I", file.read(_FILE_BYTES), 10)
    (info_bytes,) = struct.unpack("<I", file.read(4))
    if info_bytes not in (_CORE_BYTES, *_OS2_BYTES, *_WITH_MASKS):
        raise ValueError("unknown header")
    info = file.read(info_bytes - 4)
    if len(info) < info_bytes - 4:
        raise ValueError("the header is cut")
    if info_bytes == _CORE_BYTES:
        width, height, _, bits = struct.unpack("<HHHH", info)
        compression = colours = 0
    else:
        info = info.ljust(_INFO_BYTES - 4, b"\0")
        width, height, _, bits, compression, _, _, _, colours = struct.unpack_from("<iiHHIIiiI", info)
    size, masks = Size(width, abs(height)), _read_masks(file, info_bytes, info, bits, compression)
    return _Bitmap(
        info_bytes, info, size, height < 0, bits, compression, colours or 1 << bits, masks, offset or file.tell()
    )


def _read_masks(file: BinaryIO, info_bytes: int, info: bytes, bits: int, compression: int) -> tuple[int, ...]:
    colours, alpha = _MASKS.get(bits, (0, 0, 0)), 0
    if compression in (_BITFIELDS, _ALPHA_BITFIELDS):
        stated = info[36:48] if info_bytes in _WITH_MASKS else file.read(12)
        colours = struct.unpack("<III", stated) if any(stated) else colours
    if info_bytes in _WITH_ALPHA:
        (alpha,) = struct.unpack_from("<I", info, 48)
    elif compression == _ALPHA_BITFIELDS:
        (alpha,) = struct.unpack("<I", file.read(4))
    return tuple(mask & (1 << bits) - 1 for mask in (*colours, alpha))


def _masked(bitmap: _Bitmap, file: BinaryIO) -> npt.NDArray[np.uint8]:
    """`[H, W, 3]`, or `[H, W, 4]` with alpha that is used. ValueError where rows are missing."""
    width, height = bitmap.size
    sample = bitmap.bits // 8
    stride = -(-width * sample // 4) * 4
    data = file.read(stride * height)
    padding = stride - width * sample
    if padding and len(data) == stride * height - padding:  # the last row needs none
        data += bytes(padding)
    rows = np.frombuffer(data, f"<u{sample}").reshape(height, stride // sample)[:, :width]
    *colours, alpha = (_channel(rows, mask) for mask in bitmap.masks)
    pixels = np.stack([*colours, alpha] if alpha.any() else colours, axis=-1)
    return pixels if bitmap.goes_down else np.ascontiguousarray(pixels[::-1])


def _channel(rows: npt.NDArray[Any], mask: int) -> npt.NDArray[np.uint8]:
    """The masked bits on the scale of 8."""
    if not mask:
        return np.zeros(rows.shape, np.uint8)
    shift = (mask & -mask).bit_length() - 1
    bits = mask.bit_length() - shift
    values = (rows & rows.dtype.type(mask)) >> rows.dtype.type(shift + max(0, bits - 8))
    if bits >= 8:
        return values.astype(np.uint8)
    scale = np.rint(np.arange(1 << bits) * (255 / ((1 << bits) - 1))).astype(np.uint8)
    return scale[values]


def _run_lengths(bitmap: _Bitmap, file: BinaryIO) -> Image.Image:
    """With a palette. Pixels that the runs leave out have its first colour. ValueError where the runs end early."""
    width, height = bitmap.size
    file.seek(_FILE_BYTES + bitmap.info_bytes)
    table = np.frombuffer(file.read(4 * min(bitmap.colours, 1 << bitmap.bits)), np.uint8)
    palette = table[: table.size // 4 * 4].reshape(-1, 4)[:, 2::-1]
    file.seek(bitmap.offset)
    rows = _expanded(file.read(), width, height, bitmap.compression == _RLE4)
    image = Image.fromarray(rows if bitmap.goes_down else rows[::-1].copy(), "P")
    image.putpalette(palette.tobytes())
    return image


def _expanded(data: bytes, width: int, height: int, nibbles: bool) -> npt.NDArray[np.uint8]:
    """Indices `[H, W]`, rows as in the file."""
    rows, x, y, place = bytearray(width * height), 0, 0, 0
    while y < height and (place + 1 < len(data) or y < height - 1 or x < width):
        if place + 1 >= len(data):
            raise ValueError("the runs end early")
        count, value = data[place], data[place + 1]
        place += 2
        if count == 0 and value == _END_OF_BITMAP:
            break
        if count == 0 and value == _END_OF_LINE:
            x, y = 0, y + 1
        elif count == 0 and value == _DELTA:
            x, y, place = x + data[place], y + data[place + 1], place + 2
        else:
            if count:
                run = bytes((value >> 4, value & 15)) * (count + 1 >> 1) if nibbles else bytes((value,)) * count
            else:
                count, stored = value, value + 1 >> 1 if nibbles else value
                literal = data[place : place + stored]
                if len(literal) < stored:
                    raise ValueError("the runs end early")
                run = bytes(half for both in literal for half in (both >> 4, both & 15)) if nibbles else literal
                place += stored + stored % 2
            shown = max(0, min(count, width - x))
            rows[y * width + x : y * width + x + shown] = run[:shown]
            x += count
    return np.frombuffer(rows, np.uint8).reshape(height, width)
