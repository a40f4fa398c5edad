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
JpegRule = Literal["exact", "fast"]

MAX_IMAGE_PIXELS = 33_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")  # by which FORMATS are found in folders and tars


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """One decode contract for every family (docs/structures.md).

    alpha: transparent pixels are composed on white, or the alpha channel is dropped as transformers does;
    depth16: 16-bit, integer and float pictures are scaled to 8 bit, or clipped as Pillow's convert does;
    jpeg: a JPEG is decoded whole, or ("fast") at a fraction of its size where its layout makes it much smaller;
    max_pixels, max_aspect: read from the header, checked before any pixel is decoded; formats: Pillow names.
    Of a video: max_video_pixels: of all frames shown together; max_file_frames: in the file; video_seconds: that its
    decoding may take.
    """

    alpha: AlphaRule = "white"
    depth16: DepthRule = "scale"
    jpeg: JpegRule = "exact"
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
class ProcessorClass:
    """What an image processor of transformers takes for keys that its file lacks.

    name: without the suffixes `Fast` and `Pil` of its variants; twin: another class of the same code, "" for none;
    resample: Pillow's number; size: pixels along a side, not asked where every picture has its own (own_sizes);
    cuts_squares: pictures are square before they are resized, so that a shortest edge is a side.
    """

    name: str
    resample: int
    size: int = 224
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    cuts_squares: bool = False
    own_sizes: bool = False
    twin: str = ""

    def check_class(self, reader: ConfigReader) -> None:
        """ConfigError for the file of another class that leaves one of the keys to that class' own defaults."""
        stated = reader.value("image_processor_type", str, self.name)
        if stated.removesuffix("Fast").removesuffix("Pil") in (self.name, self.twin):
            return
        keys = ("resample", "image_mean", "image_std", "do_center_crop", *(() if self.own_sizes else ("size",)))
        if missing := [key for key in keys if not reader.has(key)]:
            raise ConfigError(
                f"{reader.name}: image_processor_type {stated!r} has defaults that siglane does not know, and the file "
                f"does not state {', '.join(missing)}; state it, or name {self.name}"
            )


SIGLIP = ProcessorClass(name="SiglipImageProcessor", resample=3)
SIGLIP2 = ProcessorClass(name="Siglip2ImageProcessor", resample=2, own_sizes=True)
OVIS = ProcessorClass(name="SiglipImageProcessor", resample=2, own_sizes=True)  # of the class only this is used
IDEFICS3 = ProcessorClass(name="Idefics3ImageProcessor", twin="SmolVLMImageProcessor", resample=1, own_sizes=True)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LLAVA_ONEVISION = ProcessorClass(
    name="LlavaOnevisionImageProcessor", resample=3, size=384, mean=CLIP_MEAN, std=CLIP_STD, cuts_squares=True
)
VIDEO_LLAMA_3 = ProcessorClass(
    name="VideoLlama3ImageProcessor", twin="VideoLlama3VideoProcessor", resample=3, own_sizes=True
)
VIDEOLLAMA3_QWEN2 = ProcessorClass(  # the authors'
    name="Videollama3ImageProcessor", resample=3, own_sizes=True, mean=CLIP_MEAN, std=CLIP_STD
)


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
        cls, raw: RawConfig, defaults: ProcessorClass = SIGLIP, *, name: str = "preprocessor_config.json"
    ) -> ImageProcessorConfig:
        """Absent keys take `defaults`, those of the family's class. A file that names another class has the defaults of
        that one, which nobody here knows: it must state every key."""
        reader = ConfigReader(raw, name)
        defaults.check_class(reader)
        for key in ("do_resize", "do_rescale", "do_normalize"):
            if not reader.value(key, bool, True):
                raise ConfigError(f"{name}: {key} false is not supported; the tower would see other pixels")
        filter_number = reader.value("resample", int, defaults.resample)
        if not 0 <= filter_number < len(RESAMPLES):
            raise ConfigError(f"{name}: resample {filter_number} is not one of Pillow's filters 0..5")
        size = Size(defaults.size, defaults.size) if defaults.own_sizes else _size(reader, "size", defaults)
        cropped = reader.value("do_center_crop", bool, False)
        if cropped and not (reader.has("crop_size") and _size(reader, "crop_size", defaults) == size):
            raise ConfigError(f"{name}: do_center_crop true is not supported; pictures are seen to their edges")
        return cls(
            size=size,
            resample=RESAMPLES[filter_number],
            mean=_three(reader, "image_mean", defaults.mean),
            std=_three(reader, "image_std", defaults.std),
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


def longest_edge(reader: ConfigReader, key: str, default: int) -> int:
    """Of a size that states nothing else: pixels of the longer side."""
    return reader.section(key, {"longest_edge": default}).size("longest_edge")


def _size(reader: ConfigReader, key: str, defaults: ProcessorClass) -> Size:
    """A side, `[height, width]` or an object."""
    found = reader.raw.get(key)
    if isinstance(found, list) and len(found) == 2:
        height, width = (ConfigReader({key: side}, reader.name).size(key) for side in found)
        return Size(width, height)
    if not isinstance(found, Mapping):
        side = reader.size(key, defaults.size)
        return Size(side, side)
    section = reader.section(key)
    if not section.has("shortest_edge"):
        return Size(section.size("width"), section.size("height"))
    side = section.size("shortest_edge")
    if not defaults.cuts_squares:
        raise ConfigError(
            f"{section.name}: shortest_edge keeps a picture's aspect, which this tower cannot take; state height and "
            f"width {side} to squash pictures"
        )
    return Size(side, side)


def _three(reader: ConfigReader, key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    found = reader.raw.get(key)
    if found is None:
        return default
    if not isinstance(found, list | tuple) or len(found) != 3:
        raise ConfigError(f"{reader.name}: {key} must be three numbers, got {found!r}")
    red, green, blue = (ConfigReader({key: value}, reader.name).value(key, float) for value in found)
    return red, green, blue
