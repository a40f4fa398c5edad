"""GIF files (CompuServe, GIF89a): frames are found here, each is decoded by Pillow alone, and drawn here.

Pillow decides by itself what shows where no frame was drawn, and refuses a picture whose extensions are odd. The rules
here are the standard's as FFmpeg reads it: there the background colour shows, or nothing where a frame is transparent
or the file has no palette of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO

from PIL import Image

from siglane.errors import ImageError
from siglane.image.header import Header
from siglane.types import Size

_SCREEN = struct.Struct("<6sHHBBx")
_IMAGE = struct.Struct("<HHHHB")
_CONTROL = 0xF9
_NOTHING = (255, 255, 255, 0)
_TO_BACKGROUND, _TO_PREVIOUS = 2, 3
_MOST_STRAYS = 4096  # bytes between blocks


@dataclass(frozen=True, slots=True)
class Frame:
    """left, top: where it is drawn; disposal: what is done with its place before the next one is; background: RGBA of
    what shows where it was; data: a GIF file of this frame alone; delay: hundredths of a second until the next one."""

    left: int
    top: int
    size: Size
    disposal: int
    background: tuple[int, int, int, int]
    data: bytes
    delay: int


@dataclass(frozen=True, slots=True)
class _Control:
    transparent: int | None = None
    disposal: int = 0
    delay: int = 0


def read_header(file: BinaryIO) -> Header:
    """The screen, which grows where the first frame does not fit on it. ValueError without a frame."""
    _, width, height, *_ = _SCREEN.unpack(file.read(_SCREEN.size))
    file.seek(0)
    first = next(read_frames(file), None)
    if first is None:
        raise ValueError("no frame")
    return Header(Size(max(width, first.left + first.size.width), max(height, first.top + first.size.height)))


def open_image(file: BinaryIO) -> Image.Image:
    """RGBA, the screen as the first frame leaves it."""
    size = read_header(file).stored
    file.seek(0)
    return next(draw(read_frames(file), size))


def draw(frames: Iterable[Frame], size: Size) -> Iterator[Image.Image]:
    """The screen after each frame, RGBA: one image, drawn over and over. Frames are cut where it ends.

    ImageError for a frame of more pixels than the screen has.
    """
    screen = None
    for frame in frames:
        fresh = screen is None
        if screen is None:
            screen = Image.new("RGBA", size, frame.background)
        if frame.size.width * frame.size.height > size.width * size.height:
            raise ImageError("a frame is larger than the animation", code="image_too_large")
        drawn = Image.open(BytesIO(frame.data), formats=("GIF",)).convert("RGBA")
        place = (frame.left, frame.top)
        before = screen.copy() if frame.disposal == _TO_PREVIOUS else None
        screen.paste(drawn, place, None if fresh else drawn)  # alpha may be dropped: hidden colours are the file's
        yield screen
        if before is not None:
            screen = before
        elif frame.disposal == _TO_BACKGROUND:
            screen.paste(frame.background, (*place, frame.left + frame.size.width, frame.top + frame.size.height))


def read_frames(file: BinaryIO) -> Iterator[Frame]:
    """Frames in order, up to the trailer or the file's end."""
    magic, _, _, flags, background, *_ = _SCREEN.unpack(file.read(_SCREEN.size))
    palette = file.read(_palette_bytes(flags))
    control, strays = _Control(), 0
    while (label := file.read(1)) not in (b"", b";") and strays <= _MOST_STRAYS:
        if label == b"!":
            control = _read_extension(file, control)
        elif label == b",":
            yield _read_frame(file, magic, palette, background, control)
            control = _Control()
        else:  # some writers end a block twice
            strays += 1


def _read_extension(file: BinaryIO, control: _Control) -> _Control:
    """The graphic control that holds for the next frame; every other extension is stepped over."""
    kind, blocks = file.read(1), _read_blocks(file)
    if kind != bytes((_CONTROL,)) or blocks[0] != 4 or len(blocks) < 6:
        return control
    flags, delay, transparent = struct.unpack_from("<BHB", blocks, 1)
    return _Control(transparent if flags & 1 else None, flags >> 2 & 7, delay)


def _read_frame(file: BinaryIO, magic: bytes, palette: bytes, background: int, control: _Control) -> Frame:
    left, top, width, height, flags = _IMAGE.unpack(file.read(_IMAGE.size))
    own_palette = file.read(_palette_bytes(flags))
    colours = own_palette or palette
    if control.transparent is None:
        shown = (*palette[3 * background :][:3], 255) if 3 * background + 3 <= len(palette) else _NOTHING
    else:
        shown = (*(colours[3 * control.transparent :][:3] or b"\0\0\0"), 0)
    parts = [_SCREEN.pack(magic, width, height, _palette_flags(colours), 0), colours]
    if control.transparent is not None:
        parts.append(struct.pack("<2sBBHBx", b"!\xf9", 4, 1, 0, control.transparent))
    parts += [b",", _IMAGE.pack(0, 0, width, height, flags & 0x40), file.read(1), _read_blocks(file), b";"]
    return Frame(left, top, Size(width, height), control.disposal, shown, b"".join(parts), control.delay)


def _read_blocks(file: BinaryIO) -> bytes:
    """Sub-blocks with their lengths, the empty last one included."""
    blocks = []
    while length := file.read(1):
        blocks.append(length)
        if length == b"\0":
            break
        blocks.append(file.read(length[0]))
    return b"".join(blocks)


def _palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _palette_flags(palette: bytes) -> int:
    return 0x80 | (len(palette) // 3).bit_length() - 2 if palette else 0
