"""Small pictures of every kind, each with the RGB that it shows on white, computed from the format's standard.

Where FFmpeg reads the file by the same rule, `codec` names its decoder, and a test asks it too.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import numpy.typing as npt
from picture_files import (
    GREY,
    GREY_ALPHA,
    PALETTE,
    PNG_SIGNATURE,
    RGB,
    RGBA,
    Samples,
    bmp,
    bmp_rows,
    chunk,
    exif,
    gif,
    gif_control,
    gif_image,
    png,
    png_parts,
    riff,
    riff_chunk,
    riff_chunks,
    segment,
    tiff,
    vp8x,
)
from PIL import Image

Pixels = npt.NDArray[np.uint8]
MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    name: str
    data: bytes
    rgb: Pixels
    codec: str | None = None
    tolerance: int = 0


def shown(rgb: Samples, alpha: Samples | int = 255) -> Pixels:
    """Composed on white, rounded once."""
    wide = np.broadcast_to(np.asarray(alpha)[..., None], rgb.shape).astype(float)
    return np.floor((rgb * wide + 255 * (255 - wide)) / 255 + 0.5).astype(np.uint8)


def grey(values: Samples) -> Samples:
    return np.repeat(values[..., None], 3, axis=-1)


def flipped(rgb: Pixels, orientation: int) -> Pixels:
    """EXIF's table: where the stored 0th row and column are shown."""
    turned = rgb.swapaxes(0, 1) if orientation >= 5 else rgb
    left = orientation in (2, 3, 6, 7)
    up = orientation in (3, 4, 7, 8)
    return turned[:: -1 if up else 1, :: -1 if left else 1]


# --- PNG ------------------------------------------------------------------------------------------------------------

SHAPE = (9, 11)
COLOURS = np.random.default_rng(0).integers(0, 256, (256, 3))
OPACITIES = np.random.default_rng(1).integers(0, 256, 256)
SMALL = np.arange(24).reshape(4, 6) * 10  # the picture whose metadata are odd
SMALL_RGB = shown(grey(SMALL))
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}
DEPTHS = {GREY: (1, 2, 4, 8, 16), RGB: (8, 16), PALETTE: (1, 2, 4, 8), GREY_ALPHA: (8, 16), RGBA: (8, 16)}


def samples_of(colour: int, depth: int) -> tuple[Samples, Samples]:
    """Values as stored, and on the scale of 8 bits, `[H, W, channels]`."""
    rng = np.random.default_rng((colour, depth))
    stored = rng.integers(0, 1 << depth, (*SHAPE, CHANNELS[colour]))
    if depth == 16:
        stored = stored // 257 * 257
        return stored, stored >> 8
    return stored, stored * 255 // ((1 << depth) - 1)


def palette_chunk(depth: int) -> bytes:
    return chunk(b"PLTE", COLOURS[: 1 << depth].astype(np.uint8).tobytes())


def png_colours() -> Iterator[Case]:
    for colour, depths in DEPTHS.items():
        for depth in depths:
            stored, values = samples_of(colour, depth)
            before = (palette_chunk(depth),) if colour == PALETTE else ()
            if colour == PALETTE:
                rgb = shown(COLOURS[stored[..., 0]])
            elif colour in (RGB, RGBA):
                rgb = shown(values[..., :3], values[..., 3] if colour == RGBA else 255)
            else:
                rgb = shown(grey(values[..., 0]), values[..., 1] if colour == GREY_ALPHA else 255)
            for interlaced in (False, True):
                data = png(stored, depth, colour, *before, interlaced=interlaced)
                yield Case(f"png colour {colour} depth {depth} interlaced {interlaced}", data, rgb, "png")


def png_transparency() -> Iterator[Case]:
    for colour in (GREY, RGB, PALETTE):
        for depth in DEPTHS[colour]:
            stored, values = samples_of(colour, depth)
            if colour == PALETTE:
                opacities = OPACITIES[: max(1, (1 << depth) - 1)]  # the last colour is not named
                before = (palette_chunk(depth), chunk(b"tRNS", opacities.astype(np.uint8).tobytes()))
                rgb = shown(
                    COLOURS[stored[..., 0]], np.append(opacities, 255)[np.minimum(stored[..., 0], len(opacities))]
                )
            else:
                stored[2, 3] = stored[5, 5] = chosen = stored[0, 0]
                values[2, 3] = values[5, 5] = values[0, 0]
                before = (chunk(b"tRNS", b"".join(struct.pack(">H", value) for value in chosen)),)
                alpha = np.where((stored == chosen).all(-1), 0, 255)
                rgb = shown(values if colour == RGB else grey(values[..., 0]), alpha)
            # FFmpeg compares grey of 1, 2 and 4 bits after it is scaled, so that no value is ever transparent
            codec = None if colour == GREY and depth < 8 else "png"
            for interlaced in (False, True):
                data = png(stored, depth, colour, *before, interlaced=interlaced)
                yield Case(f"png transparent colour {colour} depth {depth} interlaced {interlaced}", data, rgb, codec)


def png_odd_transparency() -> Iterator[Case]:
    near = np.array([[[0x1111, 0x2222, 0x3333], [0x1112, 0x2222, 0x3333], [0x1111, 0x2222, 0x3300]]])
    yield Case(
        "png rgb 16 differs in the low byte",
        png(near, 16, RGB, chunk(b"tRNS", struct.pack(">HHH", *near[0, 0]))),
        shown(near >> 8, np.array([[0, 255, 255]])),
    )
    row = np.array([[5, 6, 7, 8]])
    plain = shown(grey(row))
    gone = shown(grey(row), np.array([[0, 255, 255, 255]]))
    yield Case("png grey tRNS with a high byte", png(row, 8, GREY, chunk(b"tRNS", b"\7\5")), gone, "png")
    yield Case("png grey tRNS too short", png(row, 8, GREY, chunk(b"tRNS", b"\5")), plain, "png")
    yield Case("png grey tRNS too long", png(row, 8, GREY, chunk(b"tRNS", b"\0\5\0")), plain)
    yield Case("png grey tRNS empty", png(row, 8, GREY, chunk(b"tRNS", b"")), plain, "png")
    yield Case(
        "png grey tRNS with a wrong checksum", png(row, 8, GREY, chunk(b"tRNS", b"\0\5", bad_crc=True)), gone, "png"
    )
    yield Case("png tRNS behind the pixels", png(row, 8, GREY, after=[chunk(b"tRNS", b"\0\5")]), plain, "png")
    both = chunk(b"tRNS", b"\0\5"), chunk(b"tRNS", b"\0\7")
    yield Case("png two tRNS", png(row, 8, GREY, *both), gone)
    pairs = np.array([[[5, 255], [6, 128]]])
    with_alpha = shown(grey(pairs[..., 0]), pairs[..., 1])
    yield Case("png tRNS beside an alpha channel", png(pairs, 8, GREY_ALPHA, chunk(b"tRNS", b"\0\5")), with_alpha)
    index, colours = np.array([[0, 1, 2, 200]]), chunk(b"PLTE", bytes([10, 20, 30, 200, 100, 0]))
    palette = np.array([[[10, 20, 30], [200, 100, 0], [0, 0, 0], [0, 0, 0]]])
    yield Case("png index beyond the palette is black", png(index, 8, PALETTE, colours), shown(palette), "png")
    two = index[:, :2]
    half = shown(palette[:, :2], np.array([[255, 0]]))
    yield Case("png palette, tRNS too long", png(two, 8, PALETTE, colours, chunk(b"tRNS", b"\xff\0\x80")), half, "png")
    early = png(two, 8, PALETTE, chunk(b"tRNS", b"\xff\0"), colours)
    yield Case("png tRNS before the palette", early, shown(palette[:, :2]), "png")
    faint = np.array([[[200, 10, 30, 0], [200, 10, 30, 1], [200, 10, 30, 254]]])
    yield Case("png all but gone", png(faint, 8, RGBA), shown(faint[..., :3], faint[..., 3]), "png")
    nothing = np.array([[[200, 10, 30, 0]] * 3])
    yield Case("png wholly transparent stays so", png(nothing, 8, RGBA), np.full((1, 3, 3), 255, np.uint8), "png")


LARGE = zlib.compress(bytes(MIB))
HUGE = zlib.compress(bytes(64 * MIB))
PNG_METADATA: dict[str, list[bytes]] = {
    "zTXt of 1 MiB": [chunk(b"zTXt", b"a\0\0" + LARGE)],
    "iTXt of 1 MiB": [chunk(b"iTXt", b"a\0\1\0\0\0" + LARGE)],
    "iCCP of 1 MiB": [chunk(b"iCCP", b"a\0\0" + LARGE)],
    "zTXt of 64 MiB": [chunk(b"zTXt", b"a\0\0" + HUGE)],
    "66 texts of 1 MiB": [chunk(b"zTXt", b"a\0\0" + LARGE)] * 66,
    "tEXt of 1 MiB": [chunk(b"tEXt", b"a\0" + b"x" * MIB)],
    "texts named like Pillow's keys": [
        chunk(b"tEXt", key + b"\0value") for key in (b"transparency", b"exif", b"bbox", b"interlace", b"icc_profile")
    ],
    "texts without a key": [chunk(b"tEXt", b""), chunk(b"zTXt", b""), chunk(b"iTXt", b"\0")],
    "unknown compression": [chunk(b"zTXt", b"a\0\x09xx"), chunk(b"iCCP", b"a\0\x09xx")],
    "iCCP that cannot be inflated": [chunk(b"iCCP", b"a\0\0garbage")],
    "iCCP without an end": [chunk(b"iCCP", b"a")],
    "sRGB and iCCP": [chunk(b"sRGB", b"\0"), chunk(b"iCCP", b"a\0\0" + LARGE)],
    "short chunks": [chunk(kind, b"") for kind in (b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tIME", b"bKGD", b"sBIT")],
    "wrong checksums": [
        chunk(kind, b"\0" * 9, bad_crc=True) for kind in (b"gAMA", b"pHYs", b"tEXt", b"tIME", b"eXIf", b"abCd", b"iCCP")
    ],
    "acTL cut": [chunk(b"acTL", b"\0")],
    "acTL of no frames": [chunk(b"acTL", bytes(8))],
    "two acTL": [chunk(b"acTL", b"\0\0\0\2" + bytes(4))] * 2,
    "fcTL cut": [chunk(b"acTL", b"\0\0\0\2" + bytes(4)), chunk(b"fcTL", b"\0")],
    "fcTL out of sequence": [chunk(b"fcTL", struct.pack(">5I", 7, 6, 4, 0, 0) + bytes(6))],
    "fcTL of a part": [chunk(b"fcTL", struct.pack(">5I", 0, 2, 2, 1, 1) + bytes(6))],
    "a palette that is a suggestion": [chunk(b"PLTE", bytes(6), bad_crc=True)],
    "unknown critical chunk": [chunk(b"ABCD", b"x")],
    "names that are none": [chunk(b"\0\1\2\3", b"x")],
    "orientation in XMP": [chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>')],
    "orientation of no value": [chunk(b"eXIf", exif(9))],
    "eXIf empty": [chunk(b"eXIf", b"")],
    "eXIf of garbage": [chunk(b"eXIf", b"II*\0\xff\xff\xff\xff")],
}  # fmt: skip


FFMPEG_REFUSES = ("iCCP that cannot be inflated", "eXIf empty", "eXIf of garbage")


def png_metadata() -> Iterator[Case]:
    for name, chunks in PNG_METADATA.items():
        codec = "png" if len(chunks) == 1 and name not in FFMPEG_REFUSES else None
        yield Case(f"png {name}", png(SMALL, 8, GREY, *chunks), SMALL_RGB, codec)
        yield Case(f"png {name}, behind the pixels", png(SMALL, 8, GREY, after=chunks), SMALL_RGB)
    head, pixels = png_parts(SMALL, 8, GREY)
    pieces = [chunk(b"IDAT", pixels[start : start + 3]) for start in range(0, len(pixels), 3)]
    text = chunk(b"tEXt", b"a\0b")
    yield Case(
        "png text amid the pixels", PNG_SIGNATURE + head + text.join(pieces) + chunk(b"IEND", b""), SMALL_RGB, "png"
    )
    whole = PNG_SIGNATURE + head + chunk(b"IDAT", pixels)
    yield Case("png without an end", whole, SMALL_RGB, "png")
    yield Case("png text cut at the end", whole + text[:9], SMALL_RGB)
    yield Case("png garbage behind the end", whole + chunk(b"IEND", b"") + b"garbage" * 99, SMALL_RGB, "png")
    yield Case("png text before IHDR", PNG_SIGNATURE + text + whole[8:] + chunk(b"IEND", b""), SMALL_RGB)
    yield Case("png empty pieces", PNG_SIGNATURE + head + chunk(b"IDAT", b"").join([b"", *pieces]), SMALL_RGB)
    control = chunk(b"acTL", struct.pack(">II", 1, 0))
    first = chunk(b"fcTL", struct.pack(">5IHHBB", 0, 6, 4, 0, 0, 1, 10, 0, 0))
    other = chunk(b"fdAT", struct.pack(">I", 1) + png_parts(255 - SMALL, 8, GREY)[1])
    animation = PNG_SIGNATURE + head + control + chunk(b"IDAT", pixels) + first + other + chunk(b"IEND", b"")
    yield Case("png animation behind a default image", animation, SMALL_RGB)


def orientations() -> Iterator[Case]:
    for orientation in range(1, 9):
        order = "<>"[orientation % 2]
        rgb = flipped(SMALL_RGB, orientation)
        told = chunk(b"eXIf", exif(orientation, order), bad_crc=orientation == 6)
        yield Case(f"png exif {orientation}", png(SMALL, 8, GREY, told), rgb)
        yield Case(f"png exif {orientation} behind", png(SMALL, 8, GREY, after=[told]), rgb)
    turned, cut = flipped(SMALL_RGB, 6), exif(6)[:-4]
    yield Case("png exif cut behind the orientation", png(SMALL, 8, GREY, chunk(b"eXIf", cut)), turned)
    yield Case("png exif cut in the orientation", png(SMALL, 8, GREY, chunk(b"eXIf", cut[:-6])), SMALL_RGB)
    yield Case("png exif of 99 entries", png(SMALL, 8, GREY, chunk(b"eXIf", cut[:8] + b"\x63" + cut[9:])), turned)
    yield Case("png exif orientation of 32 bits", png(SMALL, 8, GREY, chunk(b"eXIf", exif(6, kind=4))), SMALL_RGB)
    yield Case("png exif two orientations", png(SMALL, 8, GREY, chunk(b"eXIf", exif(6, count=2))), SMALL_RGB)
    for orientation in (0, 9, 255, 65535):
        told = chunk(b"eXIf", exif(orientation))
        yield Case(f"png exif {orientation}", png(SMALL, 8, GREY, told), SMALL_RGB)


# --- BMP ------------------------------------------------------------------------------------------------------------

BGRA = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
BGR = np.random.default_rng(2).integers(0, 256, (3, 5, 3))
ALPHA = np.array([[0, 128, 255, 64, 1]] * 3)
BMP_RGB = shown(BGR[..., ::-1])
BMP_COLOURS = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [100, 110, 120]])
BMP_PALETTE = b"".join(bytes((blue, green, red, 77)) for red, green, blue in BMP_COLOURS.tolist())


def packed(alpha: Samples) -> Samples:
    """BGRA as numbers of 32 bits."""
    return BGR[..., 0] | BGR[..., 1] << 8 | BGR[..., 2] << 16 | alpha << 24


def bmp_of(values: Samples, sample: int, **options: object) -> bytes:
    height, width = values.shape
    return bmp(width, height, 8 * sample, bmp_rows(values, sample), **options)  # type: ignore[arg-type]


def bmp_alpha() -> Iterator[Case]:
    used, unused = packed(ALPHA), packed(ALPHA * 0)
    clear = shown(BGR[..., ::-1], ALPHA)
    for info in (56, 108, 124):
        for compression in (0, 3):  # the mask counts with BI_RGB too, as in browsers
            masks = {"info": info, "compression": compression, "masks": BGRA}
            kind = f"bmp 32 bits, header {info}, compression {compression}"
            yield Case(f"{kind}, alpha", bmp_of(used, 4, **masks), clear, "bmp")
            yield Case(f"{kind}, alpha all 0", bmp_of(unused, 4, **masks), BMP_RGB, "bmp")
        no_mask = bmp_of(used, 4, info=info, compression=3, masks=BGRA[:3])
        yield Case(f"bmp 32 bits, header {info}, no alpha mask", no_mask, BMP_RGB, "bmp")
    # without a mask the fourth byte is not used, says the standard; FFmpeg takes it for alpha
    for info in (40, 52, 64):
        yield Case(f"bmp 32 bits, header {info}", bmp_of(used, 4, info=info), BMP_RGB)
        yield Case(
            f"bmp 32 bits, header {info}, all 0", bmp_of(unused, 4, info=info), BMP_RGB, None if info == 52 else "bmp"
        )
    for info in (40, 52):
        fields = bmp_of(used, 4, info=info, compression=3, masks=BGRA[:3])
        yield Case(f"bmp bit fields, header {info}", fields, BMP_RGB, "bmp" if info == 40 else None)
    yield Case("bmp alpha bit fields", bmp_of(used, 4, compression=6, masks=BGRA), clear)
    yield Case("bmp masks of nothing", bmp_of(used, 4, compression=3, masks=(0, 0, 0)), BMP_RGB)
    single = ALPHA * 0
    single[1, 1] = 1
    one = bmp_of(packed(single), 4, info=124, compression=3, masks=BGRA)
    yield Case("bmp one pixel with alpha", one, shown(BGR[..., ::-1], single), "bmp")


def bmp_masks() -> Iterator[Case]:
    rgb = BGR[..., ::-1]
    for shifts in ((0, 8, 16, 24), (8, 16, 24, 0), (24, 16, 8, 0), (16, 8, 0, 24)):
        values = sum(channel << shift for channel, shift in zip((*np.moveaxis(rgb, -1, 0), ALPHA), shifts, strict=True))
        masks = [0xFF << shift for shift in shifts]
        data = bmp_of(np.asarray(values), 4, info=124, compression=3, masks=masks)
        yield Case(f"bmp masks at {shifts}", data, shown(rgb, ALPHA), "bmp")
    ten = sum((channel << 2 | 3) << shift for channel, shift in zip(np.moveaxis(rgb, -1, 0), (20, 10, 0), strict=True))
    wide = bmp_of(np.asarray(ten), 4, compression=3, masks=(0x3FF << 20, 0x3FF << 10, 0x3FF))
    yield Case("bmp 10 bits a colour", wide, shown(rgb))
    words = np.random.default_rng(3).integers(0, 1 << 16, (3, 5))
    # (first bit, bits) of red, green, blue and alpha; FFmpeg knows no alpha here, and keeps 4 bits as they are
    layouts = {
        "555": ((10, 5), (5, 5), (0, 5), (15, 1)),
        "565": ((11, 5), (5, 6), (0, 5)),
        "444": ((8, 4), (4, 4), (0, 4), (12, 4)),
    }
    for name, places in layouts.items():
        masks = [((1 << bits) - 1) << at for at, bits in places]
        scaled = [np.floor((words >> at & (1 << bits) - 1) * 255 / ((1 << bits) - 1) + 0.5) for at, bits in places]
        channels = np.stack(scaled[:3], -1).astype(int)
        plain = bmp_of(words, 2, compression=3, masks=masks[:3])
        yield Case(f"bmp {name}", plain, shown(channels), None if name == "444" else "bmp")
        if len(places) == 4:
            data = bmp_of(words, 2, info=124, compression=3, masks=masks)
            yield Case(f"bmp {name} with alpha", data, shown(channels, scaled[3].astype(int)))
        if name == "555":
            yield Case("bmp 16 bits", bmp_of(words, 2), shown(channels), "bmp")


def bmp_headers() -> Iterator[Case]:
    rows = b"".join(row.astype(np.uint8).tobytes() + b"\0" for row in BGR[::-1])
    down = b"".join(row.astype(np.uint8).tobytes() + b"\0" for row in BGR)
    for info in (12, 16, 20, 24, 36, 40, 42, 46, 48, 52, 56, 60, 64, 108, 124):
        codec = "bmp" if info in (12, 40, 56, 64, 108, 124) else None
        yield Case(f"bmp 24 bits, header {info}", bmp(5, 3, 24, rows, info=info), BMP_RGB, codec)
    yield Case("bmp rows go down", bmp(5, -3, 24, down), BMP_RGB, "bmp")
    rows_down = bmp_rows(packed(ALPHA)[::-1], 4)
    yield Case("bmp masked rows go down", bmp(5, -3, 32, rows_down, info=124, compression=3, masks=BGRA),
               shown(BGR[..., ::-1], ALPHA), "bmp")  # fmt: skip
    yield Case("bmp gap before the pixels", bmp(5, 3, 24, rows, gap=9), BMP_RGB, "bmp")
    yield Case("bmp garbage behind the pixels", bmp(5, 3, 24, rows) + b"garbage" * 9, BMP_RGB, "bmp")
    yield Case("bmp last row without padding", bmp(5, 3, 24, rows[:-1]), BMP_RGB)
    words = bmp(1, 2, 16, struct.pack("<HHH", 0x7FFF, 0, 0x7C00))
    yield Case("bmp 16 bits, last row without padding", words, np.array([[[255, 0, 0]], [[255] * 3]], np.uint8))
    index = np.array([[0, 1, 2, 3, 1], [3, 2, 1, 0, 0]])
    palette = {"palette": BMP_PALETTE, "colours": 4}
    eight = bmp_of(index, 1, **palette)
    yield Case("bmp 8 bits", eight, shown(BMP_COLOURS[index]), "bmp")
    short = bmp_of(np.array([[0, 1, 2, 200]]), 1, **palette)
    yield Case("bmp index beyond the palette is black", short, shown(np.array([[*BMP_COLOURS[:3], [0, 0, 0]]])))
    four = bmp(5, 1, 4, bytes((0x01, 0x23, 0x10, 0)), **palette)  # type: ignore[arg-type]
    yield Case("bmp 4 bits", four, shown(BMP_COLOURS[np.array([[0, 1, 2, 3, 1]])]), "bmp")
    one = bmp(8, 1, 1, bytes((0x55, 0, 0, 0)), palette=BMP_PALETTE[:8], colours=2)
    yield Case("bmp 1 bit", one, shown(BMP_COLOURS[np.array([[0, 1] * 4])]), "bmp")


RUNS = {
    "whole": (1, bytes((2, 1, 0, 3, 2, 3, 1, 0, 0, 0, 5, 2, 0, 1)), [[1, 1, 2, 3, 1], [2] * 5]),
    "without an end": (1, bytes((5, 1, 0, 0, 5, 2)), [[1] * 5, [2] * 5]),
    "without ends of lines": (1, bytes((5, 1, 0, 0, 3, 2, 2, 3, 0, 1)), [[1] * 5, [2, 2, 2, 3, 3]]),
    "ending early": (1, bytes((3, 1, 0, 1)), [[1, 1, 1, 0, 0], [0] * 5]),
    "short line": (1, bytes((3, 1, 0, 0, 5, 2, 0, 1)), [[1, 1, 1, 0, 0], [2] * 5]),
    "moving on": (1, bytes((1, 1, 0, 2, 2, 0, 2, 3, 0, 0, 5, 2, 0, 1)), [[1, 0, 0, 3, 3], [2] * 5]),
    "moving up": (1, bytes((1, 1, 0, 2, 2, 1, 2, 3, 0, 1)), [[1, 0, 0, 0, 0], [0, 0, 0, 3, 3]]),
    "of nibbles": (2, bytes((5, 0x12, 0, 0, 0, 3, 0x12, 0x30, 2, 0x33, 0, 1)), [[1, 2, 1, 2, 1], [1, 2, 3, 3, 3]]),
}


def bmp_runs() -> Iterator[Case]:
    for name, (compression, data, rows) in RUNS.items():
        for height in (2, -2):
            file = bmp(5, height, 8 // compression, data, compression=compression, palette=BMP_PALETTE, colours=4)
            index = np.array(rows if height < 0 else rows[::-1])
            codec = "bmp" if height > 0 else None
            yield Case(f"bmp runs {name}, height {height}", file, shown(BMP_COLOURS[index]), codec)


# --- GIF ------------------------------------------------------------------------------------------------------------

GIF_COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]])
GIF_PALETTE = GIF_COLOURS.astype(np.uint8).tobytes()
OTHER_PALETTE = GIF_COLOURS[::-1].astype(np.uint8).tobytes()
ROW = gif_image((0, 0, 4, 1), [0, 1, 2, 3])
PART = gif_image((1, 0, 2, 1), [1, 2])
WHITE = [255, 255, 255]


def gif_case(name: str, data: bytes, *pixels: int | list[int], codec: str | None = "gif") -> Case:
    """pixels: of one row, colours or indices of them."""
    row = [GIF_COLOURS[pixel] if isinstance(pixel, int) else pixel for pixel in pixels]
    return Case(f"gif {name}", data, np.array([row], np.uint8), codec)


def gif_frames() -> Iterator[Case]:
    screen = (4, 1)
    yield gif_case("plain", gif(screen, ROW, palette=GIF_PALETTE), 0, 1, 2, 3)
    for clear in range(4):
        row = [WHITE if index == clear else index for index in range(4)]
        data = gif(screen, gif_control(clear), ROW, palette=GIF_PALETTE)
        yield gif_case(f"transparent {clear}", data, *row)
    for background in range(4):
        data = gif(screen, PART, palette=GIF_PALETTE, background=background)
        yield gif_case(f"part on background {background}", data, background, 1, 2, background)
        clear_part = gif(screen, gif_control(3), PART, palette=GIF_PALETTE, background=background)
        yield gif_case(f"part with transparency on {background}", clear_part, WHITE, 1, 2, WHITE)
    clear_part = gif(screen, gif_control(1), PART, palette=GIF_PALETTE)
    yield gif_case("part, part of it transparent", clear_part, WHITE, WHITE, 2, WHITE)
    local = gif(screen, gif_image((1, 0, 2, 1), [1, 2], OTHER_PALETTE))
    yield gif_case("part with its own palette alone", local, WHITE, 2, 1, WHITE)
    two = gif(screen, gif_image((1, 0, 2, 1), [1, 2], OTHER_PALETTE), palette=GIF_PALETTE, background=3)
    yield gif_case("part with its own palette on a background", two, 3, 2, 1, 3)
    for disposal in range(4):
        data = gif(screen, gif_control(3, disposal), ROW, gif_control(0), PART, palette=GIF_PALETTE)
        yield gif_case(f"first of two, disposal {disposal}", data, 0, 1, 2, WHITE)
    ramp = bytes(value for index in range(4) for value in (index,) * 3)
    grey_row = [[0] * 3, [1] * 3, WHITE, [3] * 3]
    yield gif_case("grey palette", gif(screen, gif_control(2), ROW, palette=ramp), *grey_row)
    short = gif(screen, gif_image((0, 0, 4, 1), [0, 1, 2, 3], GIF_PALETTE[:6]))
    yield gif_case("index beyond the palette is black", short, 0, 1, [0] * 3, [0] * 3, codec=None)
    yield gif_case("larger than its screen", gif((2, 1), ROW, palette=GIF_PALETTE), 0, 1, 2, 3, codec=None)
    yield gif_case("without a screen", gif((0, 0), ROW, palette=GIF_PALETTE), 0, 1, 2, 3, codec=None)
    lines = np.arange(9) % 4
    order = [*range(0, 9, 8), *range(4, 9, 8), *range(2, 9, 4), *range(1, 9, 2)]
    data = gif((1, 9), gif_image((0, 0, 1, 9), lines[order].tolist(), interlaced=True), palette=GIF_PALETTE)
    yield Case("gif interlaced", data, shown(GIF_COLOURS[lines[:, None]]), "gif")


GIF_BLOCKS = {
    "comment": b"!\xfe\x03abc\x02de\0",
    "empty comment": b"!\xfe\0",
    "1 MiB of comments": b"!\xfe" + (b"\xff" + bytes(255)) * 4096 + b"\0",
    "text": b"!\x01\x0c" + bytes(12) + b"\x01a\0",
    "unknown extension": b"!\x77\x03abc\x02de\0",
    "application": b"!\xff\x0bNETSCAPE2.0\x03\x01\0\0\0",
    "application cut": b"!\xff\x0bNETSCAPE2.0\x01\x01\0",
    "application without a name": b"!\xff\0",
    "control cut": b"!\xf9\x02\x01\0\0",
    "control empty": b"!\xf9\0",
    "control too long": b"!\xf9\x05\x01\0\0\x01\0\0",
    "control replaced": gif_control(1) + gif_control(),
}


def gif_blocks() -> Iterator[Case]:
    for name, block in GIF_BLOCKS.items():
        yield gif_case(name, gif((4, 1), block, ROW, palette=GIF_PALETTE), 0, 1, 2, 3)
    yield gif_case("ends of blocks doubled", gif((4, 1), b"\0\0", ROW, palette=GIF_PALETTE), 0, 1, 2, 3, codec=None)
    yield gif_case("control behind the image", gif((4, 1), ROW, gif_control(1), palette=GIF_PALETTE), 0, 1, 2, 3)
    yield gif_case("garbage behind the end", gif((4, 1), ROW, palette=GIF_PALETTE) + b"garbage", 0, 1, 2, 3)
    yield gif_case("without an end", gif((4, 1), ROW, palette=GIF_PALETTE)[:-1], 0, 1, 2, 3)
    old = gif((4, 1), ROW, palette=GIF_PALETTE).replace(b"GIF89a", b"GIF87a")
    yield gif_case("of 1987", old, 0, 1, 2, 3)


# --- WebP -----------------------------------------------------------------------------------------------------------

WIDE, HIGH = 12, 8
WEBP_RGBA = np.dstack([np.random.default_rng(4).integers(0, 256, (HIGH, WIDE, 3)), np.full((HIGH, WIDE), 255)])
WEBP_CLEAR = np.dstack([WEBP_RGBA[..., :3], np.resize([255, 128, 0, 7, 254], (HIGH, WIDE))])


def encoded(pixels: Samples, kind: str, **options: object) -> bytes:
    stream = BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, kind, **options)
    return stream.getvalue()


def webp_files() -> Iterator[Case]:
    rgb, clear = shown(WEBP_RGBA[..., :3]), shown(WEBP_CLEAR[..., :3], WEBP_CLEAR[..., 3])
    whole = encoded(WEBP_RGBA[..., :3], "WEBP", lossless=True)
    with_alpha = encoded(WEBP_CLEAR, "WEBP", lossless=True, exact=True)
    (pixels,) = (riff_chunk(kind, body) for kind, body in riff_chunks(whole).items())
    (clear_pixels,) = (riff_chunk(kind, body) for kind, body in riff_chunks(with_alpha).items())
    head, junk, told = vp8x(WIDE, HIGH, 0), riff_chunk(b"JUNK", b"abc"), riff_chunk(b"EXIF", exif(6))
    yield Case("webp lossless", whole, rgb, "webp")
    yield Case("webp lossless with alpha", with_alpha, clear, "webp")
    yield Case("webp alpha without its flag", riff(head, clear_pixels), clear, "webp")
    yield Case("webp flag without alpha", riff(vp8x(WIDE, HIGH, 0x10), pixels), rgb, "webp")
    odd = {
        "unknown chunk before": riff(head, junk, pixels), "unknown chunk behind": riff(head, pixels, junk),
        "unknown chunk first": riff(junk, pixels), "unknown chunk in a simple file": riff(pixels, junk),
        "profile behind the pixels": riff(vp8x(WIDE, HIGH, 0x20), pixels, riff_chunk(b"ICCP", b"abc")),
        "broken profile": riff(vp8x(WIDE, HIGH, 0x20), riff_chunk(b"ICCP", b"abc"), pixels),
        "two profiles": riff(vp8x(WIDE, HIGH, 0x20), *[riff_chunk(b"ICCP", bytes(MIB))] * 2, pixels),
        "flags of what is not there": riff(vp8x(WIDE, HIGH, 0x2C), pixels),
        "flag of an animation": riff(vp8x(WIDE, HIGH, 0x02), pixels), "size 0": riff(pixels, size=0),
        "garbage behind": riff(pixels) + b"garbage" * 9,
        "broken exif": riff(vp8x(WIDE, HIGH, 0x08), pixels, riff_chunk(b"EXIF", b"garbage")),
    }  # fmt: skip
    for name, data in odd.items():
        yield Case(f"webp {name}", data, rgb, "webp")
    yield Case("webp size of more", riff(pixels, size=99999), rgb)
    yield Case("webp metadata cut", riff(head, pixels, told)[:-9], rgb)
    for place, chunks in {"behind": (pixels, told), "before": (told, pixels)}.items():
        for flags in (0, 0x08):
            data = riff(vp8x(WIDE, HIGH, flags), *chunks)
            yield Case(f"webp exif {place} the pixels, flags {flags}", data, flipped(rgb, 6))
    long_head = riff(vp8x(WIDE, HIGH, 8), pixels, riff_chunk(b"EXIF", b"Exif\0\0" + exif(8, ">")))
    yield Case("webp exif with JPEG's head", long_head, flipped(rgb, 8))
    frame = (
        struct.pack("<I", 1)[:3] + struct.pack("<I", 1)[:3] + struct.pack("<I", WIDE - 1)[:3]
        + struct.pack("<I", HIGH - 1)[:3] + struct.pack("<I", 100)[:3] + b"\0"
    )  # fmt: skip
    canvas = np.full((HIGH + 4, WIDE + 5, 3), 255, np.uint8)
    canvas[2 : 2 + HIGH, 2 : 2 + WIDE] = rgb
    for flags in (0x02, 0x12):  # a canvas shows through where no frame is, whatever its colour
        parts = riff_chunk(b"ANIM", bytes((0, 255, 0, 255, 0, 0))), riff_chunk(b"ANMF", frame + pixels)
        yield Case(f"webp first frame is a part, flags {flags}", riff(vp8x(WIDE + 5, HIGH + 4, flags), *parts), canvas)


# --- JPEG -----------------------------------------------------------------------------------------------------------

BLOCKS = np.kron(np.random.default_rng(5).integers(0, 256, (2, 3, 3)), np.ones((16, 16, 1), int))
JPEG = encoded(BLOCKS, "JPEG", quality=100, subsampling=0)
MPO_INDEX = b"MPF\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + struct.pack("<HHII", 0xB001, 4, 1, 2) + bytes(16)
EXIF_DPI = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2)
JPEG_SEGMENTS: dict[str, list[bytes]] = {
    "JFIF cut": [segment(0xE0, b"JFIF\0")],
    "Adobe cut": [segment(0xEE, b"Adobe")],
    "profile empty": [segment(0xE2, b"ICC_PROFILE\0")],
    "profile broken": [segment(0xE2, b"ICC_PROFILE\0\1\1garbage")],
    "profile of 254 parts": [
        segment(0xE2, b"ICC_PROFILE\0" + bytes((part, 255)) + bytes(65000)) for part in range(1, 255)
    ],
    "Photoshop cut": [segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed")],
    "pictures index broken": [segment(0xE2, b"MPF\0garbage")],
    "pictures index without entries": [segment(0xE2, MPO_INDEX)],
    "exif resolution of bytes": [
        segment(0xE1, EXIF_DPI + struct.pack("<HHII", 0x11A, 7, 1, 0) + struct.pack("<HHII", 0x128, 3, 1, 2) + bytes(4))
    ],
    "exif empty": [segment(0xE1, b"Exif\0\0")],
    "exif broken": [segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff")],
    "exif of no value": [segment(0xE1, b"Exif\0\0" + exif(77))],
    "orientation in XMP": [segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>')],
    "50 comments of 64 KiB": [segment(0xFE, b"x" * 65533)] * 50,
    "all application segments": [segment(0xE0 + number, b"x" * 65533) for number in range(16)],
    "empty segments": [segment(0xE5, b"")] * 99,
    "a second start": [b"\xff\xd8"],
    "fill bytes": [b"\xff" * 9000],
    "a bare marker": [b"\xff\x01"],
}  # fmt: skip


def jpeg_files() -> Iterator[Case]:
    rgb = shown(BLOCKS)
    yield Case("jpeg plain", JPEG, rgb, "mjpeg", 2)
    for name, segments in JPEG_SEGMENTS.items():
        # behind JFIF's own segment, which stays the first
        data = JPEG[:20] + b"".join(segments) + JPEG[20:]
        yield Case(f"jpeg {name}", data, rgb, "mjpeg", 2)
    yield Case("jpeg junk between segments", JPEG[:20] + b"junk" + JPEG[20:], rgb, "mjpeg", 2)
    yield Case("jpeg garbage behind", JPEG + b"garbage" * 99, rgb, "mjpeg", 2)
    yield Case("jpeg a second picture behind", JPEG + JPEG, rgb, None, 2)
    yield Case(
        "jpeg progressive", encoded(BLOCKS, "JPEG", quality=100, subsampling=0, progressive=True), rgb, "mjpeg", 2
    )
    for orientation in range(1, 9):
        told = segment(0xE1, b"Exif\0\0" + exif(orientation, "<>"[orientation % 2]))
        upright = flipped(rgb, orientation)
        yield Case(f"jpeg exif {orientation}", JPEG[:20] + told + JPEG[20:], upright, None, 2)
    first, second = (segment(0xE1, b"Exif\0\0" + exif(orientation)) for orientation in (6, 3))
    yield Case("jpeg two exif", JPEG[:20] + first + second + JPEG[20:], flipped(rgb, 6), None, 2)
    with_thumbnail = segment(0xE1, b"Exif\0\0" + exif(6) + JPEG)
    yield Case("jpeg with a thumbnail", JPEG[:2] + with_thumbnail + JPEG[2:], flipped(rgb, 6), None, 2)
    yield from jpeg_colours()


def jpeg_colours() -> Iterator[Case]:
    """Inks are stored inverted, with Adobe's marker or without: 255 is none."""
    ink = np.kron(np.random.default_rng(6).integers(0, 256, (2, 3, 4)), np.ones((16, 16, 1), int))
    light = 255 - ink
    rgb = shown(np.rint(light[..., :3] * light[..., 3:] / 255).astype(int))
    stream = BytesIO()
    Image.frombytes("CMYK", (48, 32), ink.astype(np.uint8).tobytes()).save(stream, "JPEG", quality=100, subsampling=0)
    cmyk = stream.getvalue()
    adobe = cmyk.index(b"Adobe") - 4
    yield Case("jpeg CMYK", cmyk, rgb, "mjpeg", 3)
    yield Case("jpeg CMYK without Adobe's marker", cmyk[:adobe] + cmyk[adobe + 16 :], rgb, "mjpeg", 3)
    luma = light.astype(float)  # the stored components taken for YCCK
    red = luma[..., 0] + 1.402 * (luma[..., 2] - 128)
    green = luma[..., 0] - 0.344136 * (luma[..., 1] - 128) - 0.714136 * (luma[..., 2] - 128)
    blue = luma[..., 0] + 1.772 * (luma[..., 1] - 128)
    inks = 255 - np.clip(np.stack([red, green, blue], -1), 0, 255)  # Adobe's YCC is that of the inks' complement
    ycck = shown(np.rint(inks * light[..., 3:] / 255).astype(int))
    data = cmyk[: adobe + 15] + b"\2" + cmyk[adobe + 16 :]
    yield Case("jpeg YCCK", data, ycck, None, 4)
    yield Case("jpeg grey", encoded(BLOCKS[..., 0], "JPEG", quality=100), shown(grey(BLOCKS[..., 0])), "mjpeg", 2)
    direct = encoded(BLOCKS, "JPEG", quality=100, subsampling=0, keep_rgb=True)
    yield Case("jpeg RGB", direct, shown(BLOCKS), "mjpeg", 2)


# --- TIFF -----------------------------------------------------------------------------------------------------------

TIFF_RGB = np.arange(18).reshape(1, 6, 3) * 11
TIFF_PIXELS = TIFF_RGB.astype(np.uint8).tobytes()
THREE = {258: (3, [8] * 3), 262: (3, [2]), 277: (3, [3])}
TIFF_TAGS = {
    "plain": {},
    "private tags": {65000: (7, b"x" * 99), 40000: (3, [1] * 50)},
    "broken profile": {34675: (7, b"garbage")},
    "exif that is not there": {34665: (4, [99999999])},
    "orientation of no value": {274: (3, [9])},
    "orientation in XMP": {700: (7, b'<x tiff:Orientation="6"/>')},
    "resolution of nothing": {296: (3, [9]), 282: (4, [0])},
    "name that is no text": {270: (7, b"\xff\xfe\xfd\0")},
}


def tiff_files() -> Iterator[Case]:
    rgb = shown(TIFF_RGB)
    for name, tags in TIFF_TAGS.items():
        for order in "<>":
            yield Case(f"tiff {name} {order}", tiff(6, 1, THREE | tags, TIFF_PIXELS, order), rgb, "tiff")  # type: ignore[operator]
    for orientation in range(1, 9):
        data = tiff(6, 1, THREE | {274: (3, [orientation])}, TIFF_PIXELS)
        yield Case(f"tiff orientation {orientation}", data, flipped(rgb, orientation))
    straight = np.array([[[10, 20, 30, 128], [64, 64, 64, 64], [0, 0, 0, 0], [200, 100, 50, 255]]])
    over = (straight[..., :3] + 255 - straight[..., 3:]).astype(np.uint8)  # associated: multiplied already
    meanings = {0: shown(straight[..., :3]), 1: over, 2: shown(straight[..., :3], straight[..., 3])}
    for meaning, expected in meanings.items():
        for depth in (8, 16):
            tags = {258: (3, [depth] * 4), 262: (3, [2]), 277: (3, [4]), 338: (3, [meaning])}
            stored = straight.astype(np.uint8) if depth == 8 else (straight * 257).astype("<u2")
            yield Case(
                f"tiff {depth} bits, extra samples {meaning}", tiff(4, 1, tags, stored.tobytes()), expected, None, 1
            )
        tags = {258: (3, [8] * 2), 262: (3, [1]), 277: (3, [2]), 338: (3, [meaning])}
        pairs = straight[..., [0, 3]].astype(np.uint8).tobytes()
        yield Case(f"tiff grey, extra samples {meaning}", tiff(4, 1, tags, pairs), grey(expected[..., 0]), None, 1)
    words = np.array([[0x1111, 0xFFFF, 0]])
    for photometric, levels in ((1, words >> 8), (0, 255 - (words >> 8))):
        tags = {258: (3, [16]), 262: (3, [photometric]), 277: (3, [1])}
        yield Case(
            f"tiff 16 bits, {photometric}", tiff(3, 1, tags, words.astype("<u2").tobytes()), shown(grey(levels)), "tiff"
        )


def corpus() -> list[Case]:
    parts = (
        png_colours, png_transparency, png_odd_transparency, png_metadata, orientations, bmp_alpha, bmp_masks,
        bmp_headers, bmp_runs, gif_frames, gif_blocks, webp_files, jpeg_files, tiff_files,
    )  # fmt: skip
    return [case for part in parts for case in part()]
