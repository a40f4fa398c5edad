"""Bytes -> one upright 8-bit RGB picture: one contract for every family and every file format (docs/structures.md).

The size that `read_size` takes from the header is the size that `decode` returns, so prompts can be laid out before
any pixel exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, TiffImageFile

from siglane.config.preprocess import DecodeConfig
from siglane.errors import ImageError
from siglane.image import bmp, gif, jpeg, png, webp
from siglane.image.header import UPRIGHT, Header, orientation_of
from siglane.image.reduce import reduced_size, region_of, shrink_of
from siglane.image.signature import MARKUP, SIGNATURE_BYTES, format_in_base64, format_of, kind_of
from siglane.types import DecodedImage, ImageLayout, ReducedImage, Size

# EXIF orientation -> what makes the picture upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# each finds in a file what makes its picture; TIFF and AVIF are Pillow's alone
_READERS = {"JPEG": jpeg, "PNG": png, "WEBP": webp, "GIF": gif, "BMP": bmp}

_MIN_IS_WHITE = 0  # of a grey TIFF; Pillow turns 8 bits round, 16 not


def read_size(file: bytes | BinaryIO, config: DecodeConfig) -> Size:
    """Size of the upright picture, from its header alone; of an open file nothing else is read.

    Raises ImageError: image_format_not_allowed, image_decode_failed, image_too_large, image_aspect_ratio.
    """
    with _as_image_error():
        return _read_header(BytesIO(file) if isinstance(file, bytes) else file, config)[1].upright


def pil_size(image: Image.Image, config: DecodeConfig) -> Size:
    """`read_size` of a picture that Pillow already opened."""
    with _as_image_error():
        _check_size(Size(*image.size), config)
        image.load()  # it may hold the EXIF data behind its pixels
        return _pil_header(image).upright


def decode(data: bytes, config: DecodeConfig) -> DecodedImage:
    """The first frame, upright, as RGB u8 `[H, W, 3]`. Declared media types and file names play no part.

    Raises ImageError: image_format_not_allowed, image_decode_failed, image_too_large, image_aspect_ratio.
    """
    with _as_image_error():
        file = BytesIO(data)
        name, header = _read_header(file, config)
        file.seek(0)
        if name == "JPEG" and (pixels := jpeg.read_pixels(file)) is not None:
            return _of_size(DecodedImage.from_rgb(_upright(pixels, header.orientation)), header)
        file.seek(0)
        image = _READERS[name].open_image(file) if name in _READERS else _open(file, config)
        return _of_size(_to_decoded(image, header.orientation, config), header)


def decode_for(data: bytes, layout: ImageLayout, config: DecodeConfig) -> DecodedImage | ReducedImage:
    """The same for `layout`, where `config` allows it at a fraction of the size."""
    fast = config.jpeg == "fast" and "JPEG" in config.formats and format_of(data[:SIGNATURE_BYTES]) == "JPEG"
    shrink = shrink_of(layout) if fast else 1
    if shrink == 1:
        return decode(data, config)
    with _as_image_error():
        file = BytesIO(data)
        _, header = _read_header(file, config)
        file.seek(0)
        image = jpeg.open_image(file, shrink)
        image.load()
        if header.upright != layout.source or Size(*image.size) != reduced_size(header.stored, shrink):
            raise _undecodable()
        rgb = _upright(_to_rgb(image, config), header.orientation)
        return ReducedImage.from_rgb(rgb, header.upright, region_of(header, shrink))


def from_pil(image: Image.Image, config: DecodeConfig, orientation: int | None = None) -> DecodedImage:
    """The same contract for a picture that Pillow already opened: its current frame; any format, any mode.

    What of it is transparent is Pillow's word. orientation: of EXIF data that Pillow was not shown.
    """
    with _as_image_error():
        _check_size(Size(*image.size), config)
        image.load()
        return _to_decoded(image, orientation or _pil_header(image).orientation, config)


@contextmanager
def _as_image_error() -> Iterator[None]:
    # Pillow's plugins raise almost anything on damaged input (OSError, SyntaxError, struct.error, RuntimeError, bare
    # Exception), and their messages may hold addresses of buffers: none of it may reach a client.
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError("the image has too many pixels", code="image_too_large") from None
    except Exception:
        raise _undecodable() from None


def _undecodable() -> ImageError:
    return ImageError("the image cannot be decoded: its data are damaged or incomplete", code="image_decode_failed")


def _read_header(file: BinaryIO, config: DecodeConfig) -> tuple[str | None, Header]:
    """The format, None for one that Pillow alone reads, and what the file says of the picture; its size is checked."""
    name = format_of(file.read(SIGNATURE_BYTES))
    file.seek(0)
    if name in _READERS and name in config.formats:
        header = _READERS[name].read_header(file)
    else:
        name, header = None, _pil_header(_open(file, config))
    _check_size(header.upright, config)
    return name, header


def _open(file: BinaryIO, config: DecodeConfig) -> Image.Image:
    """By Pillow alone. An orientation that is stated in XMP counts nowhere else, and Pillow turns pixels by it without
    saying so in the size."""
    try:
        image = Image.open(file, formats=config.formats)
    except UnidentifiedImageError:
        raise _unidentified(file, config) from None
    image.info.pop("xmp", None)
    return image


def _pil_header(image: Image.Image) -> Header:
    exif = image.info.get("exif")
    # Pillow turns the pixels of a TIFF itself, while decoding
    orientation = orientation_of(exif) if isinstance(exif, bytes) and image.format != "TIFF" else UPRIGHT
    return Header(Size(*image.size), orientation)


def _unidentified(file: BinaryIO, config: DecodeConfig) -> ImageError:
    file.seek(0)
    head = file.read(SIGNATURE_BYTES)
    kind, allowed = kind_of(head), ", ".join(config.formats)
    if kind is None and head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        kind = MARKUP
    if kind is None or not kind.picture:
        inside = format_in_base64(head.decode("latin-1"))
        what = kind.name if kind else inside and f"{inside} in base64: decode it once more"
        told = f" ({what})" if what else ""
        return ImageError(f"not an image{told}; accepted formats: {allowed}", code="image_decode_failed")
    if kind.name in config.formats:
        return _undecodable()
    return ImageError(f"{kind.name} is not accepted; accepted formats: {allowed}", code="image_format_not_allowed")


def _check_size(size: Size, config: DecodeConfig) -> None:
    width, height = size
    if min(size) < 1:
        raise ImageError("the image has no pixels", code="image_decode_failed")
    if width * height > config.max_pixels:
        message = f"the image has {width} x {height} pixels; at most {config.max_pixels} are accepted"
        raise ImageError(message, code="image_too_large")
    if max(size) > config.max_aspect * min(size):
        message = f"the image has {width} x {height} pixels; sides up to {config.max_aspect}:1 are accepted"
        raise ImageError(message, code="image_aspect_ratio")


def _to_decoded(image: Image.Image, orientation: int, config: DecodeConfig) -> DecodedImage:
    image.load()
    return DecodedImage.from_rgb(_upright(_to_rgb(image, config), orientation))


def _upright(rgb: Image.Image | npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    turn = _TURNS.get(orientation)
    if turn is None:
        return np.asarray(rgb)
    return np.asarray((rgb if isinstance(rgb, Image.Image) else Image.fromarray(rgb)).transpose(turn))


def _of_size(decoded: DecodedImage, header: Header) -> DecodedImage:
    """ImageError for another size than the header's."""
    if decoded.size != header.upright:
        raise _undecodable()
    return decoded


def _to_rgb(image: Image.Image, config: DecodeConfig) -> Image.Image:
    if config.depth16 == "scale" and image.mode.startswith(("I", "F")):
        image = _to_8_bit(image)
    if image.mode == "La":  # grey of a TIFF, already multiplied by alpha
        image = image.convert("LA")
    if image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        return image.convert("RGB")  # opened by the caller; its alpha is not used, see image/bmp.py
    if config.alpha == "white" and image.has_transparency_data:
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        if alpha.getextrema() != (255, 255):
            canvas = Image.new("RGB", rgba.size, "white")
            canvas.paste(rgba, mask=alpha)
            return canvas
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Grey (and alpha) of a 16-bit, integer or float picture, which Pillow's own conversion would clip to white."""
    values = np.asarray(image)
    if not image.mode.startswith("I;16"):
        return Image.fromarray(_stretch(values))
    if isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == _MIN_IS_WHITE:
        values = 65535 - values
    grey = (values >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is None:
        return Image.fromarray(grey)
    alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
    return Image.fromarray(np.stack([grey, alpha], axis=-1))


def _stretch(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Smallest value to 0, largest to 255. A picture of one value has no range to stretch and is clipped."""
    wide = values.astype(np.float64)
    finite = np.isfinite(wide)
    low, high = wide.min(where=finite, initial=np.inf), wide.max(where=finite, initial=-np.inf)
    if low < high:
        wide = (wide - low) * (255 / (high - low))
    return np.clip(np.rint(np.nan_to_num(wide)), 0, 255).astype(np.uint8)
