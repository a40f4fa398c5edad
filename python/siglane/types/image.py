"""An image on its way to the language model: decoded, cut into patches, packed, projected."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from siglane.types.layout import Grid, ImageLayout, Region, Size, VideoSize

if TYPE_CHECKING:
    import torch

DIGEST_BYTES = 32


def digest_of(*parts: bytes) -> bytes:
    """SHA-256 over `parts`, each framed by its length so that no two lists of parts collide. 32 bytes."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.digest()


@dataclass(frozen=True, slots=True, eq=False)
class DecodedImage:
    """An upright RGB picture. rgb: u8 `[H, W, 3]`, contiguous; digest: 32 bytes over pixels and shape."""

    rgb: npt.NDArray[np.uint8]
    digest: bytes

    def __post_init__(self) -> None:
        if self.rgb.dtype != np.uint8 or self.rgb.ndim != 3 or self.rgb.shape[2] != 3:
            raise ValueError(f"rgb must be u8 [H, W, 3], got {self.rgb.dtype} {self.rgb.shape}")
        _check_digest(self.digest)

    @classmethod
    def from_rgb(cls, rgb: npt.NDArray[np.uint8]) -> DecodedImage:
        rgb = np.ascontiguousarray(rgb)
        shape = f"{rgb.shape[0]}x{rgb.shape[1]}".encode()
        return cls(rgb, digest_of(b"siglane.rgb", shape, rgb.tobytes()))

    @property
    def size(self) -> Size:
        return Size(self.rgb.shape[1], self.rgb.shape[0])


@dataclass(frozen=True, slots=True, eq=False)
class ReducedImage:
    """An upright RGB picture that was decoded at a fraction of its size. rgb: u8 `[H, W, 3]`, contiguous; size: of the
    whole picture; region: where in `rgb` it lies; digest: 32 bytes over all of them, of no `DecodedImage`."""

    rgb: npt.NDArray[np.uint8]
    size: Size
    region: Region
    digest: bytes

    def __post_init__(self) -> None:
        _check_digest(self.digest)

    @classmethod
    def from_rgb(cls, rgb: npt.NDArray[np.uint8], size: Size, region: Region) -> ReducedImage:
        rgb = np.ascontiguousarray(rgb)
        facts = repr((rgb.shape, tuple(size), tuple(region))).encode()
        return cls(rgb, size, region, digest_of(b"siglane.reduced", facts, rgb.tobytes()))


@dataclass(frozen=True, slots=True, eq=False)
class DecodedVideo:
    """The frames of a video that the model is shown, in order. frames: u8 `[H, W, 3]` each; digest: 32 bytes over all
    pixels and their shapes. The layout is the first frame's; others may have their own size, see `render_tiles`."""

    frames: tuple[npt.NDArray[np.uint8], ...]
    digest: bytes

    def __post_init__(self) -> None:
        if not self.frames:
            raise ValueError("a clip has at least one frame")
        if any(frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 for frame in self.frames):
            raise ValueError("the frames of a clip must be u8 [H, W, 3]")
        _check_digest(self.digest)

    @classmethod
    def of(cls, frames: Sequence[DecodedImage]) -> DecodedVideo:
        return cls(tuple(frame.rgb for frame in frames), digest_of(b"siglane.clip", *(f.digest for f in frames)))

    @property
    def size(self) -> VideoSize:
        height, width = self.frames[0].shape[:2]
        return VideoSize(Size(width, height), len(self.frames))


@dataclass(frozen=True, slots=True, eq=False)
class ImagePatches:
    """One image cut into patches, on the host, not yet normalised.

    pixels: `[layout.patches, patch_dim]`, u8 or f32, both on the scale 0..255; patches of all tiles in order;
    digest: 32 bytes over the image's digest and every option that changes pixels or layout.
    """

    pixels: torch.Tensor
    layout: ImageLayout
    digest: bytes

    def __post_init__(self) -> None:
        if self.pixels.ndim != 2 or self.pixels.shape[0] != self.layout.patches or not self.pixels.is_contiguous():
            raise ValueError(f"pixels must be [{self.layout.patches}, patch_dim], got {tuple(self.pixels.shape)}")
        _check_digest(self.digest)


@dataclass(frozen=True, slots=True, eq=False)
class PackedPatches:
    """Patches of many images in one tensor, ready for the tower.

    pixels: `[N, patch_dim]`, normalised, on the device; grids: one per tile, on the host; `sum(h * w) == N`.
    """

    pixels: torch.Tensor
    grids: tuple[Grid, ...]

    def __post_init__(self) -> None:
        patches = sum(grid.area for grid in self.grids)
        if self.pixels.ndim != 2 or self.pixels.shape[0] != patches:
            raise ValueError(f"grids hold {patches} patches, pixels are {tuple(self.pixels.shape)}")


@dataclass(frozen=True, slots=True, eq=False)
class ImageTokens:
    """Projector output. embeds: `[T, hidden_size]`; lengths: rows of each image, `sum(lengths) == T`."""

    embeds: torch.Tensor
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.embeds.ndim != 2 or self.embeds.shape[0] != sum(self.lengths):
            raise ValueError(f"lengths add up to {sum(self.lengths)}, embeds are {tuple(self.embeds.shape)}")

    def split(self) -> tuple[torch.Tensor, ...]:
        return self.embeds.split(list(self.lengths))


def _check_digest(digest: bytes) -> None:
    if len(digest) != DIGEST_BYTES:
        raise ValueError(f"a digest has {DIGEST_BYTES} bytes, got {len(digest)}")
