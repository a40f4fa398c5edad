"""The facts of the image path: how bytes become pixels and pixels become tiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from siglane.config.reader import ConfigReader, RawConfig
from siglane.errors import ConfigError
from siglane.tiling.rule import LayoutRule
from siglane.types import Resample, Size

AlphaRule = Literal["white", "drop"]
DepthRule = Literal["scale", "clip"]

MAX_IMAGE_PIXELS = 33_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
OPTIONAL_FORMATS = ("TIFF", "AVIF")
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")  # by which FORMATS are found in folders and tars


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """One decode contract for every family (docs/structures.md).

    alpha: transparent pixels are composed on white, or the alpha channel is dropped as transformers does;
    depth16: 16-bit, integer and float pictures are scaled to 8 bit, or clipped as Pillow's convert does;
    max_pixels, max_aspect: read from the header, checked before any pixel is decoded; formats: Pillow names.
    Of a video: max_video_pixels: of all frames shown together; max_file_frames: in the file; video_seconds: that its
    decoding may take.
    """

    alpha: AlphaRule = "white"
    depth16: DepthRule = "scale"
    max_pixels: int = MAX_IMAGE_PIXELS
    max_aspect: int = 200
    formats: tuple[str, ...] = FORMATS
    max_video_pixels: int = 1 << 27
    max_file_frames: int = 500_000
    video_seconds: float = 30.0


# a local caller's strip of 17 x 4000 pixels is meant; a server's client sends one to find out what breaks
LOCAL_DECODE = DecodeConfig(max_aspect=1 << 16)


# PIL.Image.Resampling by number, as `resample` in preprocessor_config.json
RESAMPLES: tuple[Resample, ...] = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageProcessorConfig:
    """What a transformers `SiglipImageProcessor` file states. size: pixels of its resize; mean, std: per channel, on
    the 0..1 scale; rescale: factor from 0..255 to 0..1."""

    size: Size
    resample: Resample
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float

    @property
    def fill(self) -> tuple[int, int, int]:
        """The mean as a colour, which LLaVA and VILA pad with."""
        red, green, blue = (int(channel * 255) for channel in self.mean)
        return red, green, blue

    @classmethod
    def from_hf(
        cls,
        raw: RawConfig,
        *,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        resample: int = 3,
        size: int = 224,
        name: str = "preprocessor_config.json",
    ) -> ImageProcessorConfig:
        """Absent keys take the defaults given, which are `SiglipImageProcessor`'s (bicubic, 0.5, 1/255, 224)."""
        reader = ConfigReader(raw, name)
        for key in ("do_resize", "do_rescale", "do_normalize"):
            if not reader.value(key, bool, True):
                raise ConfigError(f"{name}: {key} false is not supported; the tower would see other pixels")
        filter_number = reader.value("resample", int, resample)
        if not 0 <= filter_number < len(RESAMPLES):
            raise ConfigError(f"{name}: resample {filter_number} is not one of Pillow's filters 0..5")
        return cls(
            size=_size(reader, size),
            resample=RESAMPLES[filter_number],
            mean=_three(reader, "image_mean", mean),
            std=_three(reader, "image_std", std),
            rescale=reader.value("rescale_factor", float, 1 / 255),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessConfig:
    """How an upright RGB image becomes patches: the family's layout rule, and how pixels are normalised.

    mean, std, rescale: as in `ImageProcessorConfig`.
    """

    rule: LayoutRule
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float

    def __post_init__(self) -> None:
        if min(self.std) <= 0 or self.rescale <= 0:
            raise ConfigError(f"image_std {self.std} and rescale_factor {self.rescale} must be positive")

    @classmethod
    def of(cls, rule: LayoutRule, processor: ImageProcessorConfig) -> PreprocessConfig:
        return cls(rule=rule, mean=processor.mean, std=processor.std, rescale=processor.rescale)


def _size(reader: ConfigReader, default: int) -> Size:
    if isinstance(reader.raw.get("size"), Mapping):
        section = reader.section("size")
        return Size(section.size("width"), section.size("height"))
    side = reader.size("size", default)
    return Size(side, side)


def _three(reader: ConfigReader, key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    found = reader.raw.get(key)
    if found is None:
        return default
    if not isinstance(found, list | tuple) or len(found) != 3:
        raise ConfigError(f"{reader.name}: {key} must be three numbers, got {found!r}")
    red, green, blue = (ConfigReader({key: value}, reader.name).value(key, float) for value in found)
    return red, green, blue
