"""Everything that can be set about the server; flags and environment variables are generated from these fields.

Light on purpose: no torch, no web framework, so that a bad port or a missing model is reported at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from siglane.errors import ConfigError

MIB = 1 << 20

ImageFormat = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on; 0.0.0.0 lets others in"})
    port: int = field(default=8000, metadata={"help": "TCP port; 0 takes a free one"})
    api_key: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "key that clients must send as a bearer token, except to /health, /ready and /metrics"},
    )
    served_model_name: str | None = field(
        default=None, metadata={"help": "name of the model in the API; default: MODEL as given (a folder: its name)"}
    )
    model_aliases: tuple[str, ...] = field(default=(), metadata={"help": "further names the model answers to"})
    cors_origins: tuple[str, ...] = field(
        default=(), metadata={"help": "web origins whose pages may call the server; none by default"}
    )
    default_temperature: float = field(default=1.0, metadata={"help": "temperature of requests that name none"})

    max_queue: int = field(
        default=256, metadata={"help": "requests being read, waiting or running at one time; more are answered 503"}
    )
    max_body_bytes: int = field(default=64 * MIB, metadata={"help": "largest request body"})
    max_inflight_bytes: int = field(
        default=4096 * MIB,
        metadata={"help": "bodies, files and patches of all requests together; a request beyond it is answered 503"},
    )
    body_timeout: float = field(default=30.0, metadata={"help": "seconds a client has to send its request body"})
    idle_timeout: int = field(
        default=30, metadata={"help": "seconds a connection may stay without a (whole) request header"}
    )
    stall_timeout: float = field(
        default=30.0, metadata={"help": "seconds a client may leave its answer unread before it is dropped"}
    )
    sse_keep_alive: float = field(
        default=15.0, metadata={"help": "seconds of silence after which a stream gets a comment line; 0: never"}
    )
    drain_timeout: float = field(
        default=30.0, metadata={"help": "seconds that running requests get to finish after SIGTERM"}
    )

    max_images: int = field(default=16, metadata={"help": "images per request"})
    max_videos: int = field(default=1, metadata={"help": "videos per request; 0: none"})
    max_image_bytes: int = field(default=20 * MIB, metadata={"help": "largest image file"})
    max_video_bytes: int = field(default=100 * MIB, metadata={"help": "largest video file"})
    max_image_pixels: int = field(default=33_000_000, metadata={"help": "pixels of one image, and of one request"})
    max_image_patches: int = field(
        default=1 << 16, metadata={"help": "patches of one image or video, whatever budget a client asks for"}
    )
    max_video_pixels: int = field(default=1 << 27, metadata={"help": "pixels of all frames shown of one video"})
    max_video_frames: int | None = field(
        default=None, metadata={"help": "frames that a client may have shown of one video; none: the model's own limit"}
    )
    video_seconds: float = field(default=20.0, metadata={"help": "seconds that decoding one video may take"})
    image_alpha: Literal["white", "drop"] = field(
        default="white", metadata={"help": "transparent pixels: composed on white, or drop the alpha channel"}
    )
    image_16bit: Literal["scale", "clip"] = field(
        default="scale", metadata={"help": "16-bit pictures: scale to 8 bit, or clip as Pillow's convert does"}
    )
    image_formats: tuple[ImageFormat, ...] = field(
        default=("JPEG", "PNG", "WEBP", "GIF", "BMP"), metadata={"help": "accepted image formats"}
    )
    allowed_local_media_path: str | None = field(
        default=None, metadata={"help": "folder whose files requests may name by file:// URLs; none by default"}
    )
    allow_http_images: bool = field(default=True, metadata={"help": "fetch images and videos from http and https URLs"})
    allow_private_addresses: bool = field(
        default=False, metadata={"help": "fetch images and videos from private and loopback addresses too"}
    )
    image_timeout: float = field(
        default=10.0, metadata={"help": "seconds to fetch one image or video, with its name look-up"}
    )
    image_redirects: int = field(default=3, metadata={"help": "redirects followed for one image or video"})
    fetch_threads: int = field(default=16, metadata={"help": "images fetched at one time"})
    decode_threads: int = field(default=0, metadata={"help": "images decoded at one time; 0: one per core, at most 8"})

    log_format: Literal["text", "json"] = field(default="text", metadata={"help": "log lines as text or as JSON"})
    log_level: Literal["debug", "info", "warning", "error"] = field(default="info", metadata={"help": "log threshold"})

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be between 0 and 65535, got {self.port}")
        for name in ("max_queue", "max_body_bytes", "max_inflight_bytes", "max_image_bytes", "max_image_pixels"):
            _at_least(name, getattr(self, name), 1)
        for name in ("idle_timeout", "fetch_threads", "max_video_bytes", "max_video_pixels", "max_image_patches"):
            _at_least(name, getattr(self, name), 1)
        if self.max_video_frames is not None:
            _at_least("max_video_frames", self.max_video_frames, 1)
        for name in (
            "max_images",
            "max_videos",
            "image_redirects",
            "decode_threads",
            "sse_keep_alive",
            "drain_timeout",
        ):
            _at_least(name, getattr(self, name), 0)
        for name in ("body_timeout", "stall_timeout", "image_timeout", "video_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.default_temperature <= 2:
            raise ConfigError(f"default_temperature must be between 0 and 2, got {self.default_temperature}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise ConfigError("api_key must be printable ASCII and not empty")


def _at_least(name: str, value: float, least: int) -> None:
    if not value >= least:
        raise ConfigError(f"{name} must be at least {least}, got {value}")
