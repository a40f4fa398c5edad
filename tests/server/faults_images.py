"""Rows 1 to 14: what comes as a picture."""

from __future__ import annotations

import base64
import io
import secrets
import struct
import zlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from faults import FIRST_IMAGE, Refused, Stage, refusals
from PIL import Image, ImageOps
from serving import RunningServer, chat, encode, image_part, image_url, picture


def with_image(url: str) -> dict[str, Any]:
    return chat(image_url(url), "What is this?")


def header_only_png(width: int, height: int) -> bytes:
    """A PNG whose header promises pixels that are not there: refused by its header, or it fails as damaged."""

    def block(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + block(b"IDAT", zlib.compress(b"")) + block(b"IEND", b"")


def truncated(format: str) -> bytes:
    data = picture(80, 80, format=format)
    return data[: len(data) // 2]


def bad(file: bytes, code: str = "image_decode_failed", says: str = "") -> Refused:
    return Refused(chat(image_part(file), "What is this?"), code, FIRST_IMAGE, says)


def bad_url(url: str, code: str, says: str = "") -> Refused:
    return Refused(with_image(url), code, FIRST_IMAGE, says)


FORMAT, LIST = "image_format_not_allowed", "JPEG, PNG, WEBP, GIF, BMP"
BASE64 = base64.b64encode(picture()).decode()
REFUSED: dict[str, Refused] = {
    "1 no bytes": bad(b""),
    "1 no image": bad(b"hello, world" * 20),
    "2 jpeg": bad(truncated("JPEG")),
    "2 png": bad(truncated("PNG")),
    "2 webp": bad(truncated("WEBP")),
    "2 gif": bad(truncated("GIF")),
    "3 avif": bad(b"\0\0\0\x1cftypavif" + bytes(range(200)), FORMAT),
    "4 bomb by header": bad(header_only_png(60000, 60000), "image_too_large"),
    "4 real bomb": bad(encode(Image.new("1", (6000, 6000))), "image_too_large"),
    "5 long side": bad(encode(Image.new("L", (65500, 1))), "image_aspect_ratio"),
    "5 high side": bad(encode(Image.new("L", (1, 300))), "image_aspect_ratio"),
    "12 svg": bad(b'<svg xmlns="http://www.w3.org/2000/svg"/>', FORMAT, LIST),
    "12 html": bad(b"<!DOCTYPE html><html></html>", FORMAT, LIST),
    "12 pdf": bad(b"%PDF-1.7\n" + b"x" * 100, FORMAT, LIST),
    "12 eps": bad(b"%!PS-Adobe-3.0 EPSF-3.0\n" + b"x" * 100, FORMAT, LIST),
    "12 psd": bad(b"8BPS\0\1" + b"\0" * 100, FORMAT, LIST),
    "12 tiff": bad(encode(Image.new("L", (4, 4)), "TIFF"), FORMAT, LIST),
    "13 letters": bad_url("data:image/png;base64,!!!!", "invalid_base64"),
    "13 padding": bad_url("data:image/png;base64," + BASE64.rstrip("=") + "A", "invalid_base64"),
    "13 white space": bad_url("data:image/png;base64," + BASE64[:80] + "\n" + BASE64[80:], "invalid_base64"),
    "13 url-safe": bad_url("data:image/png;base64,_-_-", "invalid_base64"),
    "13 not ascii": bad_url("data:image/png;base64,ééé=", "invalid_base64"),
    "14 no comma": bad_url("data:image/png;base64", "invalid_base64"),
    "14 not base64": bad_url("data:image/png,%89PNG", "invalid_base64"),
}


def cached(server: RunningServer, file: bytes, salt: str) -> int:
    """Tokens of a prompt with this picture that one before it has left. The text behind it is longer than a page."""
    answer = server.post(chat(image_part(file), "x " * 60, max_tokens=1, cache_salt=salt))
    assert answer.status_code == 200, answer.text
    found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def see(cases: Mapping[str, tuple[bytes, Image.Image]], stage: Stage) -> None:
    """Each file is taken for this picture and no other: exactly its pixels are found again in the cache."""
    for name, (file, plain) in cases.items():
        salt = secrets.token_hex(8)
        first, other, found = (
            cached(stage.server, one, salt) for one in (encode(plain), encode(ImageOps.invert(plain)), file)
        )
        assert first == 0, name
        assert other < found, f"{name}: another picture than it shows"


def decoded(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file)).convert("RGB")


def shown(file: bytes) -> tuple[bytes, Image.Image]:
    """As Pillow decodes it."""
    return file, decoded(file)


def turned(orientation: int) -> tuple[bytes, Image.Image]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encode(RGB, exif=exif)
    return file, ImageOps.exif_transpose(Image.open(io.BytesIO(file)))


RGB = decoded(picture(40, 30, seed=5))
GREY = RGB.convert("L")
FRAMES = [RGB.rotate(90 * turn) for turn in range(3)]
HALF = Image.new("L", RGB.size, 0)
HALF.paste(255, (0, 0, 20, 30))
ON_WHITE = Image.composite(RGB, Image.new("RGB", RGB.size, "white"), HALF)
CMYK = encode(RGB.convert("CMYK"), "JPEG")
ADOBE = CMYK.index(b"Adobe") - 4  # where its marker begins
PALETTE = RGB.quantize(16)
UNSEEN = np.array([[index == 0] for index in PALETTE.get_flattened_data()]).reshape(30, 40)
SEEN: dict[int, dict[str, tuple[bytes, Image.Image]]] = {
    5: {"one pixel": shown(encode(Image.new("RGB", (1, 1)))), "200:1": shown(encode(Image.new("RGB", (400, 2))))},
    6: {
        "cmyk": shown(CMYK),
        "ycck": shown(CMYK[: ADOBE + 15] + b"\2" + CMYK[ADOBE + 16 :]),  # the same numbers, said to be luma and chroma
    },
    7: {"grey": (encode(Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)), GREY.convert("RGB"))},
    8: {
        "palette": (encode(PALETTE), PALETTE.convert("RGB")),
        "a palette with a hole": (
            encode(PALETTE, transparency=0),
            Image.composite(Image.new("RGB", RGB.size, "white"), PALETTE.convert("RGB"), Image.fromarray(UNSEEN)),
        ),
        "rgba": (encode(Image.merge("RGBA", (*RGB.split(), HALF))), ON_WHITE),
        "la": (
            encode(Image.merge("LA", (GREY, HALF))),
            Image.composite(GREY, Image.new("L", RGB.size, 255), HALF).convert("RGB"),
        ),
    },
    9: {
        **{f"turned, {way}": turned(way) for way in range(2, 9)},
        "broken": (encode(RGB, exif=b"Exif\0\0II*\0" + b"\xff" * 40), RGB),
    },
    10: {
        "gif": shown(encode(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:])),
        "webp": (encode(FRAMES[0], "WEBP", lossless=True, save_all=True, append_images=FRAMES[1:]), RGB),
        "apng": (encode(FRAMES[0], save_all=True, append_images=FRAMES[1:]), RGB),
    },
    11: {"webp": (encode(RGB, "WEBP", lossless=True), RGB), "bmp": (encode(RGB, "BMP"), RGB)},  # each called a PNG
}
TABLE = refusals(REFUSED)
for _number, _cases in SEEN.items():
    TABLE.row(_number, "seen as it is")(partial(see, _cases))
