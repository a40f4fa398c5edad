"""What requests may ask a server to read: the same settings for siglane's own server and for a host's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from siglane.config.preprocess import LOCAL_DECODE, MAX_IMAGE_PIXELS, DecodeConfig
from siglane.settings.options import above_zero, at_least, option

MIB = 1 << 20

ImageFormat = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeOptions:
    """How pictures are decoded, for every command; the meaning of each is `DecodeConfig`'s."""

    image_alpha: Literal["white", "drop"] = option(
        "white", "transparent pixels: composed on white, or drop the alpha channel"
    )
    image_16bit: Literal["scale", "clip"] = option(
        "scale", "16-bit pictures: scale to 8 bit, or clip as Pillow's convert does"
    )
    image_decode: Literal["exact", "fast"] = option(
        "exact", "JPEGs: decoded whole, or (fast) at a fraction of their size where the model sees them small"
    )
    max_image_pixels: int = option(MAX_IMAGE_PIXELS, "pixels of one image, and of one request to a server")

    @property
    def local(self) -> DecodeConfig:
        """The contract for pictures that a local caller names."""
        return self._decoding(LOCAL_DECODE)

    def _decoding(self, config: DecodeConfig) -> DecodeConfig:
        alpha, depth16, jpeg = self.image_alpha, self.image_16bit, self.image_decode
        return replace(config, alpha=alpha, depth16=depth16, jpeg=jpeg, max_pixels=self.max_image_pixels)


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaConfig(DecodeOptions):
    max_images: int = option(16, "images per request")
    max_videos: int = option(1, "videos per request; 0: none")
    max_image_bytes: int = option(20 * MIB, "largest image file")
    max_video_bytes: int = option(100 * MIB, "largest video file")
    max_image_patches: int = option(1 << 16, "patches of one image or video, whatever budget a client asks for")
    max_video_pixels: int = option(1 << 27, "pixels of all frames shown of one video")
    max_video_frames: int | None = option(
        None, "frames that a client may have shown of one video; none: the model's own limit"
    )
    video_seconds: float = option(20.0, "seconds that decoding one video may take")
    image_formats: tuple[ImageFormat, ...] = option(("JPEG", "PNG", "WEBP", "GIF", "BMP"), "accepted image formats")
    allowed_local_media_path: str | None = option(
        None, "folder whose files requests may name by file:// URLs; none by default"
    )
    allow_http_images: bool = option(True, "fetch images and videos from http and https URLs")
    allow_private_addresses: bool = option(False, "fetch images and videos from private and loopback addresses too")
    image_timeout: float = option(10.0, "seconds to fetch one image or video, with its name look-up")
    image_redirects: int = option(3, "redirects followed for one image or video")

    def __post_init__(self) -> None:
        for name in ("max_image_bytes", "max_image_pixels", "max_video_bytes", "max_video_pixels", "max_image_patches"):
            at_least(name, getattr(self, name), 1)
        if self.max_video_frames is not None:
            at_least("max_video_frames", self.max_video_frames, 1)
        for name in ("max_images", "max_videos", "image_redirects"):
            at_least(name, getattr(self, name), 0)
        for name in ("image_timeout", "video_seconds"):
            above_zero(name, getattr(self, name))

    @property
    def decode(self) -> DecodeConfig:
        """The contract for what requests bring."""
        of_media = DecodeConfig(
            formats=self.image_formats, max_video_pixels=self.max_video_pixels, video_seconds=self.video_seconds
        )
        return self._decoding(of_media)
