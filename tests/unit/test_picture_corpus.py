"""Several hundred small pictures: each shows the pixels that its format's standard says, and its header its size."""

from __future__ import annotations

import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import get_args

import av
import numpy as np
import pytest
from picture_corpus import HUGE, LARGE, MIB, SMALL, Case, Pixels, corpus, shown
from picture_files import (
    GREY,
    PALETTE,
    PNG_SIGNATURE,
    bmp,
    chunk,
    exif,
    gif,
    gif_control,
    png,
    png_parts,
    riff,
    riff_chunk,
    segment,
    vp8x,
)
from PIL import Image, ImageFile, PngImagePlugin

import siglane
from siglane.config.preprocess import DecodeConfig
from siglane.errors import ImageError
from siglane.image.decode import decode, from_pil, pil_size, read_size
from siglane.settings.media import ImageFormat
from siglane.types import Size

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CONFIG = DecodeConfig(formats=get_args(ImageFormat))
CASES = corpus()
MOST_TO_CUT = 10_000  # bytes; larger files are large because of their metadata
av.logging.set_level(av.logging.PANIC)


def differ(one: Pixels, other: Pixels) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def ffmpeg(data: bytes, codec: str) -> Pixels:
    """The first frame as FFmpeg decodes it, on white."""
    context = av.CodecContext.create(codec, "r")
    frames = context.decode(av.Packet(data)) or context.decode(None)
    rgba = frames[0].to_ndarray(format="rgba")
    return shown(rgba[..., :3].astype(int), rgba[..., 3].astype(int))


def test_there_are_enough() -> None:
    assert len(CASES) >= 300
    assert len({case.name for case in CASES}) == len(CASES)
    assert sum(case.codec is not None for case in CASES) >= 150


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_picture(case: Case) -> None:
    decoded = decode(case.data, CONFIG)
    assert differ(decoded.rgb, case.rgb) <= case.tolerance
    height, width = case.rgb.shape[:2]
    assert read_size(case.data, CONFIG) == decoded.size == Size(width, height)


@pytest.mark.parametrize("case", [case for case in CASES if case.codec], ids=lambda case: case.name)
def test_ffmpeg_agrees(case: Case) -> None:
    assert case.codec is not None
    assert differ(ffmpeg(case.data, case.codec), case.rgb) <= case.tolerance + 1  # it rounds 16, 6 and 5 bits otherwise


def outcome(data: bytes) -> Pixels | ImageError:
    try:
        return decode(data, CONFIG).rgb
    except ImageError as error:
        return error


def pixels_of(rgb: Pixels) -> list[bytes]:
    return sorted(pixel.tobytes() for pixel in rgb.reshape(-1, 3))


@pytest.mark.parametrize("part", sorted({case.name.split()[0] for case in CASES}))
def test_what_is_cut_is_refused_unless_no_pixel_is_missing(part: str) -> None:
    """Wherever the file ends, there are all pixels or none; of them alone, EXIF data may be what is missing."""
    refused = 0
    for case in CASES:
        if not case.name.startswith(part) or len(case.data) > MOST_TO_CUT:
            continue
        for end in sorted({*(len(case.data) * tenth // 10 for tenth in range(1, 10)), len(case.data) - 1}):
            cut = outcome(case.data[:end])
            if isinstance(cut, ImageError):
                assert cut.code == "image_decode_failed"
                refused += 1
            else:
                near = case.tolerance and differ(cut, case.rgb) <= case.tolerance
                assert near or pixels_of(cut) == pixels_of(case.rgb), (case.name, end)
    assert refused > 50


def test_metadata_cost_neither_memory_nor_time() -> None:
    """64 MiB that are inflated by nobody, in every kind of text, before and behind the pixels."""
    texts = [
        chunk(b"zTXt", b"a\0\0" + HUGE), chunk(b"iTXt", b"a\0\1\0\0\0" + HUGE), chunk(b"iCCP", b"a\0\0" + HUGE),
        *[chunk(b"zTXt", b"a\0\0" + LARGE)] * 64,
    ]  # fmt: skip
    data = png(SMALL, 8, GREY, *texts, after=texts)
    began = time.process_time()
    tracemalloc.start()
    try:
        for read in (read_size, decode):
            read(data, CONFIG)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MIB
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize(
    "data",
    [
        PNG_SIGNATURE + chunk(b"tEXt", b"") * 100_100,
        b"\xff\xd8" + b"\xff\xe5\0\2" * 200_000,
        riff(riff_chunk(b"JUNK", b"") * 200_000),
        b"GIF89a" + bytes(100_000),
    ],
    ids=["png", "jpeg", "webp", "gif"],
)
def test_files_of_nothing_but_metadata_end_soon(data: bytes) -> None:
    began = time.process_time()
    for read in (read_size, decode):
        with pytest.raises(ImageError) as caught:
            read(data, CONFIG)
        assert caught.value.code == "image_decode_failed"
    assert time.process_time() - began < 5


def test_many_threads_decode_at_once() -> None:
    switches = ImageFile.LOAD_TRUNCATED_IMAGES, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    small = [case for case in CASES if len(case.data) < MOST_TO_CUT] * 2
    with ThreadPoolExecutor(8) as pool:
        decoded = list(pool.map(lambda case: decode(case.data, CONFIG), small))
    assert all(differ(one.rgb, case.rgb) <= case.tolerance for one, case in zip(decoded, small, strict=True))
    assert switches == (ImageFile.LOAD_TRUNCATED_IMAGES, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)


@pytest.mark.parametrize(
    ("name", "data"),
    {
        "png wrong checksum of the header": png(SMALL, 8, GREY).replace(b"IHDR\0\0\0\6", b"IHDR\0\0\0\5"),
        "png of unknown depth": png(SMALL, 3, GREY),
        "png palette missing": png(SMALL % 2, 8, PALETTE),
        "png palette behind the pixels": png(SMALL % 2, 8, PALETTE, after=[chunk(b"PLTE", bytes(6))]),
        "png without pixels": PNG_SIGNATURE + png_parts(SMALL, 8, GREY)[0] + chunk(b"IEND", b""),
        "bmp header of no kind": bmp(5, 3, 24, bytes(48), info=41),
        "bmp runs that end": bmp(5, 2, 8, bytes((3, 1)), compression=1, palette=bytes(16), colours=4),
        "bmp literal run cut": bmp(5, 1, 8, bytes((0, 5, 1, 2)), compression=1, palette=bytes(16), colours=4),
        "bmp rows missing": bmp(5, 3, 16, bytes(24)),
        "gif without an image": gif((4, 1), gif_control(1), palette=bytes(12)),
        "webp of metadata": riff(vp8x(5, 5, 8), riff_chunk(b"EXIF", exif(6))),
        "jpeg without a frame": b"\xff\xd8" + segment(0xE1, b"Exif\0\0" + exif(6)) + b"\xff\xd9",
    }.items(),
)
def test_damaged_pixels_are_refused(name: str, data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        decode(data, CONFIG)
    assert caught.value.code == "image_decode_failed"
    assert str(caught.value) == "the image cannot be decoded: its data are damaged or incomplete"


def test_a_run_length_bomb_is_refused_on_its_header() -> None:
    data = bmp(60_000, 60_000, 8, bytes((0, 1)), compression=1, palette=bytes(16), colours=4)
    for read in (read_size, decode):
        with pytest.raises(ImageError) as caught:
            read(data, CONFIG)
        assert caught.value.code == "image_too_large"


@pytest.mark.parametrize(
    "name", ["bmp 32 bits, header 124, compression 3, alpha all 0", "bmp 32 bits, header 124, compression 3, alpha"]
)
def test_a_bitmap_that_the_caller_opened_shows_the_same(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    opened = Image.open(BytesIO(case.data))
    assert pil_size(opened, CONFIG) == read_size(case.data, CONFIG)
    assert differ(from_pil(opened, CONFIG).rgb, case.rgb) == 0


def test_pictures_are_opened_in_one_room() -> None:
    """Everything else asks `image/decode.py`; the references of `verify` read with Pillow on purpose."""
    package = Path(siglane.__file__).parent
    opening = {path.relative_to(package) for path in package.rglob("*.py") if "Image.open(" in path.read_text()}
    assert {path.parts[0] for path in opening} == {"image", "verify"}
    assert {path.as_posix() for path in opening if path.parts[0] == "verify"} == {"verify/references/pixels.py"}
