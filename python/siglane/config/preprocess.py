"""The facts of the image path: how bytes become pixels and pixels become tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

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
            mean=_three(reader.raw.get("image_mean"), "image_mean", name),
            std=_three(reader.raw.get("image_std"), "image_std", name),
            rescale=reader.value("rescale_factor", float, 1 / 255),
        )


def _tile_size(reader: ConfigReader) -> Size:
    size = reader.raw.get("size", 224)
    if isinstance(size, int):
        return Size(size, size)
    section = reader.section("size")
    return Size(section.size("width"), section.size("height"))


def _three(found: Any, key: str, name: str) -> tuple[float, float, float]:
    if found is None:
        return (0.5, 0.5, 0.5)
    if isinstance(found, list | tuple) and len(found) == 3 and all(isinstance(value, float | int) for value in found):
        return (float(found[0]), float(found[1]), float(found[2]))
    raise ConfigError(f"{name}: {key} must be three numbers, got {found!r}")
