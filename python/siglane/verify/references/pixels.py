"""Pictures as the reference image processors see them, on Pillow and torch alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from siglane.errors import ConfigError, ImageError
from siglane.verify.references.files import Raw

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_KEPT = {b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND"}
XMP = ("xmp", "XML:com.adobe.xmp")


def open_picture(data: bytes, name: str) -> Image.Image:
    """The upright picture in RGB as transformers' `load_image` gives it, but that no text in it counts: none is too
    long, and none turns it as EXIF does. ImageError when Pillow cannot read it."""
    try:
        image = Image.open(BytesIO(_without_texts(data)))
        image.load()  # a PNG may hold its EXIF data behind its pixels
        for key in XMP:
            image.info.pop(key, None)
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow's plugins raise almost anything on damaged input
        raise ImageError(f"{name} cannot be decoded by the reference", code="image_decode_failed") from error


def _without_texts(data: bytes) -> bytes:
    """A PNG's chunks that make pixels, or say how they stand; any other file as it is."""
    if not data.startswith(PNG_SIGNATURE):
        return data
    kept, at = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] in PNG_KEPT:
            checked = data[at + 4 : end - 4]
            kept.append(data[at : at + 4] + checked + crc32(checked).to_bytes(4, "big"))
        at = end
    return b"".join(kept)


@dataclass(frozen=True, slots=True)
class Processing:
    """What an image processor's file says. height, width: pixels of its resize; mean, std: `[3]`."""

    height: int
    width: int
    resample: Image.Resampling
    mean: torch.Tensor
    std: torch.Tensor
    rescale: float

    @classmethod
    def of(
        cls,
        raw: Raw,
        side: int,
        resample: Image.Resampling,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> Processing:
        """Absent keys take the values given: they are the defaults of the family's processor class."""
        raw = {key: value for key, value in raw.items() if value is not None}
        size = raw.get("size", side)
        if isinstance(size, dict):
            height, width = size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge"))
        else:
            height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
        if not isinstance(height, int) or not isinstance(width, int):
            raise ConfigError(f"the reference does not understand an image processor's size {size!r}")
        return cls(
            height,
            width,
            Image.Resampling(raw.get("resample", resample)),
            torch.tensor(raw.get("image_mean", mean)),
            torch.tensor(raw.get("image_std", std)),
            raw.get("rescale_factor", 1 / 255),
        )

    def resized(self, picture: Image.Image) -> Image.Image:
        return picture.resize((self.width, self.height), self.resample)

    def squared(self, picture: Image.Image) -> Image.Image:
        """`resized` after it was put in the middle of a square of the mean colour."""
        longest = max(picture.size)
        red, green, blue = (int(value * 255) for value in self.mean.tolist())
        canvas = Image.new("RGB", (longest, longest), (red, green, blue))
        canvas.paste(picture, ((longest - picture.width) // 2, (longest - picture.height) // 2))
        return self.resized(canvas)

    def normalised(self, picture: Image.Image) -> torch.Tensor:
        """f32 `[3, H, W]`."""
        values = torch.from_numpy(np.array(picture)).permute(2, 0, 1) * self.rescale
        return (values - self.mean[:, None, None]) / self.std[:, None, None]


def siglip_processing(raw: Raw, side: int) -> Processing:
    """The defaults of transformers' `SiglipImageProcessor`."""
    return Processing.of(raw, side, Image.Resampling.BICUBIC)


def squares_of(picture: Image.Image, side: int) -> list[Image.Image]:
    """Its tiles, row by row."""
    corners = [(x, y) for y in range(0, picture.height, side) for x in range(0, picture.width, side)]
    return [picture.crop((x, y, x + side, y + side)) for x, y in corners]


def patches_of(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """`[B, 3, H, W]` -> `[patches, 3 * patch_size**2]`, elements in the order (channel, y, x)."""
    return F.unfold(pixels, patch_size, stride=patch_size).transpose(1, 2).flatten(0, 1)
