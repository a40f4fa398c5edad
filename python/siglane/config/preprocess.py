"""The facts of the image path: how bytes become pixels and pixels become tiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from siglane.config.reader import ConfigReader, RawConfig
from siglane.errors import ConfigError
from siglane.types import Size

AlphaRule = Literal["white", "drop"]
DepthRule = Literal["scale", "clip"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
OPTIONAL_FORMATS = ("TIFF", "AVIF")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """One decode contract for every family (docs/structures.md).

    alpha: transparent pixels are composed on white, or the alpha channel is dropped as transformers does;
    depth16: 16-bit, integer and float pictures are scaled to 8 bit, or clipped as Pillow's convert does;
    max_pixels, max_aspect: read from the header, checked before any pixel is decoded; formats: Pillow names.
    """

    alpha: AlphaRule = "white"
    depth16: DepthRule = "scale"
    max_pixels: int = 33_000_000
    max_aspect: int = 200
    formats: tuple[str, ...] = FORMATS


# a local caller's strip of 17 x 4000 pixels is meant; a server's client sends one to find out what breaks
LOCAL_DECODE = DecodeConfig(max_aspect=1 << 16)


Tiling = Literal["squash", "pad", "dynamic", "dynamic_s2"]
Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]

# PIL.Image.Resampling by number, as `resample` in preprocessor_config.json
RESAMPLES: tuple[Resample, ...] = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessConfig:
    """How an upright RGB image becomes tiles.

    tile: pixels of one tile; resample: of the whole-tile resize; tiling: see `config/tokens.py`;
    min_tiles, max_tiles: bounds of the dynamic grid; s2_scales: tile-map sides in pixels, ascending (dynamic_s2);
    mean, std: per channel, on the 0..1 scale; rescale: factor from 0..255 to 0..1.
    """

    tile: Size
    resample: Resample
    tiling: Tiling
    min_tiles: int
    max_tiles: int
    s2_scales: tuple[int, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float

    def __post_init__(self) -> None:
        if min(self.std) <= 0 or self.rescale <= 0:
            raise ConfigError(f"image_std {self.std} and rescale_factor {self.rescale} must be positive")
        if self.tiling == "dynamic" and not 1 <= self.min_tiles <= self.max_tiles:
            raise ConfigError(f"min_tiles {self.min_tiles} and max_tiles {self.max_tiles} leave no grid of tiles")
        if self.tiling == "dynamic_s2":
            self._check_s2_scales()

    def _check_s2_scales(self) -> None:
        scales = self.s2_scales
        ascending = scales == tuple(sorted(set(scales)))
        if not scales or not ascending or scales[0] < 1 or any(scale % scales[0] for scale in scales):
            raise ConfigError(f"s2_scales {scales} must be ascending multiples of the first")
        if (scales[-1] // scales[0]) ** 2 > self.max_tiles:
            raise ConfigError(f"max_tiles {self.max_tiles} is too small for the largest square of s2_scales {scales}")

    @classmethod
    def from_hf(
        cls,
        raw: RawConfig,
        *,
        tiling: Tiling,
        min_tiles: int = 1,
        max_tiles: int = 1,
        s2_scales: tuple[int, ...] = (),
        name: str = "preprocessor_config.json",
    ) -> PreprocessConfig:
        """A `SiglipImageProcessor` configuration; absent keys take that class's defaults (bicubic, 0.5, 1/255, 224)."""
        reader = ConfigReader(raw, name)
        for key in ("do_resize", "do_rescale", "do_normalize"):
            if not reader.value(key, bool, True):
                raise ConfigError(f"{name}: {key} false is not supported; the tower would see other pixels")
        resample = reader.value("resample", int, 3)
        if not 0 <= resample < len(RESAMPLES):
            raise ConfigError(f"{name}: resample {resample} is not one of Pillow's filters 0..5")
        return cls(
            tile=_tile_size(reader),
            resample=RESAMPLES[resample],
            tiling=tiling,
            min_tiles=min_tiles,
            max_tiles=max_tiles,
            s2_scales=s2_scales,
            mean=_three(reader, "image_mean"),
            std=_three(reader, "image_std"),
            rescale=reader.value("rescale_factor", float, 1 / 255),
        )


def _tile_size(reader: ConfigReader) -> Size:
    if isinstance(reader.raw.get("size"), Mapping):
        section = reader.section("size")
        return Size(section.size("width"), section.size("height"))
    side = reader.size("size", 224)
    return Size(side, side)


def _three(reader: ConfigReader, key: str) -> tuple[float, float, float]:
    found = reader.raw.get(key)
    if found is None:
        return (0.5, 0.5, 0.5)
    if not isinstance(found, list | tuple) or len(found) != 3:
        raise ConfigError(f"{reader.name}: {key} must be three numbers, got {found!r}")
    red, green, blue = (ConfigReader({key: value}, reader.name).value(key, float) for value in found)
    return red, green, blue
