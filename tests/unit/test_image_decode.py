"""The decode contract: golden pixels per kind of picture, one error per kind of fault, nothing leaked."""

from __future__ import annotations

import base64
import gzip
import random
import re
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from siglane.config.preprocess import FORMATS, DecodeConfig
from siglane.errors import ImageError
from siglane.image.decode import decode, from_pil, pil_size, read_size
from siglane.settings.media import ImageFormat
from siglane.types import Size

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]

CONFIG = DecodeConfig()
REFERENCE = DecodeConfig(alpha="drop", depth16="clip")
EVERYTHING = DecodeConfig(formats=get_args(ImageFormat))
OPTIONAL_FORMATS = [name for name in EVERYTHING.formats if name not in FORMATS]
LEAKS = re.compile(r"0x|Traceback|<_io|/home|/tmp|/usr|\.py")


def encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def gradient(width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x * 7 + y * 13) % 256], -1).astype(
        np.uint8
    )


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = b"".join([header, *extra, png_chunk(b"IDAT", zlib.compress(rows)), png_chunk(b"IEND", b"")])
    return b"\x89PNG\r\n\x1a\n" + body


def pixels(data: bytes, config: DecodeConfig = CONFIG) -> list[list[list[int]]]:
    return decode(data, config).rgb.tolist()


def code_of(data: bytes, config: DecodeConfig = CONFIG) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, config)
    assert not LEAKS.search(str(caught.value))
    assert caught.value.status == 400
    return caught.value.code


def outcome(data: bytes) -> ImageError | None:
    try:
        decoded = decode(data, EVERYTHING)
    except ImageError as error:
        return error
    assert read_size(data, EVERYTHING) == decoded.size
    return None


RGB = Image.fromarray(gradient(9, 6))


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "WEBP", "TIFF"])
def test_lossless_formats_give_the_pixels_back(file_format: str) -> None:
    options = {"lossless": True} if file_format == "WEBP" else {}
    decoded = decode(encode(RGB, file_format, **options), EVERYTHING)
    assert (decoded.rgb == np.asarray(RGB)).all()
    assert decoded.rgb.flags.c_contiguous
    assert decoded.size == Size(9, 6)


@pytest.mark.parametrize("file_format", ["JPEG", "GIF", "AVIF"])
def test_lossy_formats_give_what_pillow_decodes(file_format: str) -> None:
    data = encode(RGB, file_format)
    assert (decode(data, EVERYTHING).rgb == np.asarray(Image.open(BytesIO(data)).convert("RGB"))).all()


# --- transparency -------------------------------------------------------------------------------------------------


def test_alpha_is_composed_on_white_or_dropped() -> None:
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128)])
    data = encode(image, "PNG")
    assert pixels(data) == [[[255, 0, 0], [255, 255, 255], [127, 127, 127]]]
    assert pixels(data, REFERENCE) == [[[255, 0, 0], [255, 0, 0], [0, 0, 0]]]


def test_grey_with_alpha() -> None:
    image = Image.new("LA", (2, 1))
    image.putdata([(40, 255), (40, 0)])
    assert pixels(encode(image, "PNG")) == [[[40] * 3, [255] * 3]]
    assert pixels(encode(image, "PNG"), REFERENCE) == [[[40] * 3, [40] * 3]]


def palette_image() -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 100, 0, 1, 2, 3])
    image.putdata([0, 1, 2])
    return image


def test_palette() -> None:
    assert pixels(encode(palette_image(), "PNG")) == [[[10, 20, 30], [200, 100, 0], [1, 2, 3]]]


@pytest.mark.parametrize("transparency", [1, b"\xff\x00\xff"])
def test_palette_with_transparency(transparency: int | bytes) -> None:
    data = encode(palette_image(), "PNG", transparency=transparency)
    assert pixels(data) == [[[10, 20, 30], [255, 255, 255], [1, 2, 3]]]
    assert pixels(data, REFERENCE) == [[[10, 20, 30], [200, 100, 0], [1, 2, 3]]]


def test_palette_with_its_own_alpha() -> None:
    image = palette_image()
    image.putpalette([10, 20, 30, 255, 200, 100, 0, 0, 1, 2, 3, 255], "RGBA")
    assert from_pil(image, CONFIG).rgb.tolist() == [[[10, 20, 30], [255, 255, 255], [1, 2, 3]]]
    assert from_pil(palette_image().convert("PA"), CONFIG).rgb.tolist() == [[[10, 20, 30], [200, 100, 0], [1, 2, 3]]]


def test_rgb_with_a_transparent_colour() -> None:
    image = Image.new("RGB", (2, 1))
    image.putdata([(1, 2, 3), (4, 5, 6)])
    data = encode(image, "PNG", transparency=(4, 5, 6))
    assert pixels(data) == [[[1, 2, 3], [255, 255, 255]]]
    assert pixels(data, REFERENCE) == [[[1, 2, 3], [4, 5, 6]]]


def test_grey_with_a_transparent_value() -> None:
    image = Image.new("L", (2, 1))
    image.putdata([7, 9])
    assert pixels(encode(image, "PNG", transparency=9)) == [[[7] * 3, [255] * 3]]
    assert pixels(png(2, 1, 16, 0, b"\0\x11\x11\x22\x22", png_chunk(b"tRNS", b"\x22\x22"))) == [[[17] * 3, [255] * 3]]
    assert pixels(png(8, 1, 1, 0, b"\0\x55", png_chunk(b"tRNS", b"\0\0"))) == [[[255] * 3] * 8]


def test_transparent_gif() -> None:
    data = encode(palette_image(), "GIF", transparency=1)
    assert pixels(data) == [[[10, 20, 30], [255, 255, 255], [1, 2, 3]]]


# --- colour spaces and depths -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "L", "1"])
def test_jpeg_and_png_modes(mode: str) -> None:
    flat = Image.new("RGB", (16, 16), (200, 60, 30)).convert(mode)
    decoded = decode(
        encode(flat, "PNG" if mode == "1" else "JPEG", **({} if mode == "1" else {"quality": 100})), CONFIG
    )
    expected = np.asarray(flat.convert("RGB")).astype(int)
    assert np.abs(decoded.rgb.astype(int) - expected).max() <= 4


def test_cmyk_is_not_inverted() -> None:
    # no ink is white, full black ink is black
    image = Image.new("CMYK", (32, 16), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (16, 0, 32, 16))
    rgb = decode(encode(image, "JPEG", quality=100), CONFIG).rgb
    assert rgb[8, 4].min() > 250
    assert rgb[8, 28].max() < 5


@pytest.mark.parametrize("mode", ["HSV", "LAB", "YCbCr", "CMYK", "RGBX"])
def test_other_modes_from_pillow(mode: str) -> None:
    red = Image.new("RGB", (2, 2), (250, 10, 20)).convert(mode)
    assert np.abs(from_pil(red, CONFIG).rgb.astype(int) - [250, 10, 20]).max() <= 4


def test_16_bit_grey_is_scaled_or_clipped() -> None:
    data = png(3, 1, 16, 0, b"\0\x00\x00\x11\x11\xff\xff")
    assert pixels(data) == [[[0] * 3, [17] * 3, [255] * 3]]
    assert pixels(data, REFERENCE) == [[[0] * 3, [255] * 3, [255] * 3]]


def test_16_bit_colour() -> None:
    assert pixels(png(1, 1, 16, 2, b"\0\x11\x00\x22\xff\x33\x80")) == [[[0x11, 0x22, 0x33]]]


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_16_bit_byte_orders(mode: str) -> None:
    order = ">" if mode.endswith("B") else "<"
    image = Image.frombytes(mode, (2, 1), struct.pack(order + "2H", 4369, 65535))
    assert from_pil(image, CONFIG).rgb.tolist() == [[[17] * 3, [255] * 3]]


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("I", [-1000, 0, 1000], [0, 128, 255]),
        ("F", [0.0, 0.5, 1.0], [0, 128, 255]),
        ("F", [float("nan"), 0.0, 10.0], [0, 0, 255]),
        ("F", [float("-inf"), 2.0, 4.0], [0, 0, 255]),
        ("F", [float("nan")] * 3, [0, 0, 0]),
        ("I", [300, 300, 300], [255, 255, 255]),
        ("I", [7, 7, 7], [7, 7, 7]),
    ],
)
def test_integer_and_float_pictures_are_stretched(mode: str, values: list[float], expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], np.int32 if mode == "I" else np.float32))
    assert image.mode == mode
    assert from_pil(image, CONFIG).rgb[0, :, 0].tolist() == expected


def test_float_picture_can_be_clipped_as_pillow_does() -> None:
    image = Image.fromarray(np.array([[0.5, 300.0, -4.0]], np.float32))
    assert (from_pil(image, REFERENCE).rgb == np.asarray(image.convert("RGB"))).all()


# --- orientation --------------------------------------------------------------------------------------------------

UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", sorted(UPRIGHT))
@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_orientation(orientation: int, file_format: str) -> None:
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(RGB, file_format, exif=exif_of(orientation), **options)
    decoded = decode(data, EVERYTHING)
    assert (decoded.rgb == UPRIGHT[orientation](np.asarray(RGB))).all()
    assert read_size(data, EVERYTHING) == decoded.size
    opened = Image.open(BytesIO(data))
    assert (from_pil(opened, EVERYTHING).rgb == decoded.rgb).all()
    assert (from_pil(ImageOps.exif_transpose(Image.open(BytesIO(data))), EVERYTHING).rgb == decoded.rgb).all()


@pytest.mark.parametrize("file_format", ["JPEG", "AVIF"])
def test_orientation_of_lossy_formats(file_format: str) -> None:
    data = encode(RGB, file_format, exif=exif_of(6))
    expected = ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB")
    assert (decode(data, EVERYTHING).rgb == np.asarray(expected)).all()
    assert read_size(data, EVERYTHING) == Size(6, 9)


def test_exif_behind_the_pixels_counts_too() -> None:
    data = encode(RGB, "PNG")
    data = data[:-12] + png_chunk(b"eXIf", exif_of(6).tobytes()[6:]) + data[-12:]
    assert read_size(data, CONFIG) == Size(6, 9)
    assert (decode(data, CONFIG).rgb == UPRIGHT[6](np.asarray(RGB))).all()


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0garbage!", b"Exif\0\0II*\0\xff\xff\xff\xff", b"\x00" * 40])
def test_broken_exif_is_ignored(exif: bytes) -> None:
    for file_format in ("JPEG", "WEBP"):
        data = encode(RGB, file_format, exif=exif)
        assert read_size(data, CONFIG) == decode(data, CONFIG).size == Size(9, 6)


@pytest.mark.parametrize("orientation", [0, 9, 255, 65535])
def test_orientation_out_of_range_is_ignored(orientation: int) -> None:
    assert decode(encode(RGB, "JPEG", exif=exif_of(orientation)), CONFIG).size == Size(9, 6)


# --- many frames --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_only(file_format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert decode(data, EVERYTHING).rgb[0, 0].tolist() == [255, 0, 0]


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"\0", b"not an image", b"\xff" * 1000, b"{}"])
def test_not_an_image(data: bytes) -> None:
    assert code_of(data) == "image_decode_failed"
    with pytest.raises(ImageError, match="JPEG, PNG, WEBP, GIF, BMP"):
        decode(data, CONFIG)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n", "a Git LFS pointer, not the picture"),
        (base64.b64encode(encode(Image.new("RGB", (40, 30)), "PNG")), "PNG in base64: decode it once more"),
        (base64.urlsafe_b64encode(encode(Image.new("RGB", (40, 30)), "JPEG")), "JPEG in base64"),
        (b"data:image/png;base64,iVBORw0KGgo", "a data URL written into a file"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2", "a video, or another picture format"),
        (b"\x1aE\xdf\xa3\x9fB\x86\x81\1", "a video"),
        (gzip.compress(b"\x89PNG", mtime=0), "compressed by gzip"),
        (b"PK\3\4\x14\0\0\0", "a ZIP archive"),
    ],
)
def test_what_stands_in_a_pictures_place_is_named(data: bytes, what: str) -> None:
    assert code_of(data) == "image_decode_failed"
    with pytest.raises(ImageError, match=rf"not an image \({what}.*\); accepted formats: JPEG"):
        decode(data, CONFIG)


@pytest.mark.parametrize("file_format", [*FORMATS, *OPTIONAL_FORMATS])
@pytest.mark.parametrize("kept", [0.4, 0.9])
def test_truncated(file_format: str, kept: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), file_format)
    assert code_of(data[: int(len(data) * kept)], EVERYTHING) == "image_decode_failed"


FOREIGN = {
    "PDF": b"%PDF-1.7\n%",
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "PSD": b"8BPS\0\x01" + b"\0" * 40,
    "FITS": b"SIMPLE  =                    T",
    "WMF": b"\xd7\xcd\xc6\x9a" + b"\0" * 40,
    "ICO": b"\0\0\1\0\1\0",
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0",
    "SVG or HTML": b'\xef\xbb\xbf <?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_formats(name: str) -> None:
    assert code_of(FOREIGN[name]) == "image_format_not_allowed"
    with pytest.raises(ImageError, match=f"^{name} is not accepted; accepted formats: JPEG, PNG, WEBP, GIF, BMP$"):
        decode(FOREIGN[name], CONFIG)


@pytest.mark.parametrize("file_format", OPTIONAL_FORMATS)
def test_optional_formats_are_off_by_default(file_format: str) -> None:
    data = encode(RGB, file_format)
    assert code_of(data) == "image_format_not_allowed"
    assert decode(data, EVERYTHING).size == Size(9, 6)


def test_the_list_of_formats_is_the_operators() -> None:
    only_png = DecodeConfig(formats=("PNG",))
    assert code_of(encode(RGB, "JPEG"), only_png) == "image_format_not_allowed"
    assert decode(encode(RGB, "PNG"), only_png).size == Size(9, 6)


@pytest.mark.parametrize("side", [6_000, 12_000, 2_000_000])
def test_bombs_are_refused_on_their_header(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded a bomb"))
    data = png(side, side, 8, 2, b"")
    assert code_of(data) == "image_too_large"
    with pytest.raises(ImageError):
        read_size(data, CONFIG)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (200, 1), (1, 200), (400, 2)])
def test_narrow_pictures(width: int, height: int) -> None:
    assert decode(encode(Image.new("RGB", (width, height)), "PNG"), CONFIG).size == Size(width, height)


@pytest.mark.parametrize(("width", "height"), [(201, 1), (1, 201), (65_500, 1)])
def test_too_narrow_pictures(width: int, height: int) -> None:
    assert code_of(encode(Image.new("RGB", (width, height)), "PNG")) == "image_aspect_ratio"
    with pytest.raises(ImageError) as caught:
        from_pil(Image.new("RGB", (width, height)), CONFIG)
    assert caught.value.code == "image_aspect_ratio"


def test_picture_without_pixels() -> None:
    with pytest.raises(ImageError) as caught:
        from_pil(Image.new("RGB", (0, 4)), CONFIG)
    assert caught.value.code == "image_decode_failed"


def test_memory_errors_are_not_the_clients_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(self: Image.Image, *_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", exhausted)
    with pytest.raises(MemoryError):
        decode(encode(RGB, "PNG"), CONFIG)


@pytest.mark.parametrize("file_format", [*FORMATS, *OPTIONAL_FORMATS])
def test_corruptions_end_in_pixels_or_in_an_image_error(file_format: str) -> None:
    rng = random.Random(file_format)
    original = encode(Image.fromarray(gradient(24, 16)), file_format)
    for _ in range(250):
        data = bytearray(original)
        for _ in range(rng.choice((1, 1, 3, 10))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        error = outcome(bytes(data))
        if error is not None:
            assert not LEAKS.search(str(error))
            assert error.__suppress_context__ or error.__context__ is None
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert Image.MAX_IMAGE_PIXELS == 1024 * 1024 * 1024 // 4 // 3


# --- headers, files, digests --------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", [*FORMATS, *OPTIONAL_FORMATS])
def test_sizes_come_from_the_header(file_format: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "picture.bin"
    path.write_bytes(encode(RGB, file_format))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded pixels"))
    with path.open("rb") as file:
        assert read_size(path.read_bytes(), EVERYTHING) == read_size(file, EVERYTHING) == Size(9, 6)


def test_digest_depends_on_pixels_and_shape_only() -> None:
    wide, tall = (Image.new("RGB", size, (5, 5, 5)) for size in ((4, 2), (2, 4)))
    assert from_pil(wide, CONFIG).rgb.tobytes() == from_pil(tall, CONFIG).rgb.tobytes()
    assert from_pil(wide, CONFIG).digest != from_pil(tall, CONFIG).digest
    assert decode(encode(wide, "PNG"), CONFIG).digest == decode(encode(wide, "BMP"), CONFIG).digest


def test_the_callers_picture_is_left_alone() -> None:
    image = Image.new("RGBA", (3, 2), (1, 2, 3, 4))
    image.info["transparency"] = 0
    before = image.tobytes(), dict(image.info), image.mode
    from_pil(image, CONFIG)
    assert (image.tobytes(), dict(image.info), image.mode) == before


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 60),
    height=st.integers(1, 60),
    orientation=st.integers(1, 8),
    file_format=st.sampled_from(["JPEG", "PNG", "WEBP"]),
)
def test_header_size_is_decoded_size(width: int, height: int, orientation: int, file_format: str) -> None:
    data = encode(Image.new("RGB", (width, height)), file_format, exif=exif_of(orientation))
    size = read_size(data, CONFIG)
    assert size == decode(data, CONFIG).size == pil_size(Image.open(BytesIO(data)), CONFIG)
    assert size == (Size(height, width) if orientation >= 5 else Size(width, height))
