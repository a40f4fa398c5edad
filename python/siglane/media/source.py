"""Where pictures and videos come from: data URLs, web servers, files.

Everything a stranger may ask for passes through `fetch`.
"""

from __future__ import annotations

import base64
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from PIL import Image

from siglane.config.preprocess import DecodeConfig
from siglane.config.video import VideoRule
from siglane.errors import ImageError
from siglane.image.decode import decode, from_pil, naming, open_file
from siglane.image.video import decode_video
from siglane.settings.media import MediaConfig
from siglane.types import DecodedImage, DecodedVideo

Decoded = TypeVar("Decoded")

_URL = re.compile(r"data:|[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaPolicy:
    """What a request may make this process read.

    allowed_local_root: folder whose files `file://` URLs may name, None for none; allow_http: http and https URLs;
    allow_private_addresses: also those of the own network (off: a server must not fetch from it for strangers);
    max_bytes: of one picture's file; timeout: seconds for one URL in total, name resolution included.
    """

    allowed_local_root: Path | None = None
    allow_http: bool = True
    allow_private_addresses: bool = False
    max_bytes: int = 20 * 2**20
    timeout: float = 10.0
    max_redirects: int = 3

    @classmethod
    def of(cls, config: MediaConfig) -> MediaPolicy:
        """What a server's settings allow its clients to name as a picture."""
        root = config.allowed_local_media_path
        return cls(
            allowed_local_root=None if root is None else Path(root),
            allow_http=config.allow_http_images,
            allow_private_addresses=config.allow_private_addresses,
            max_bytes=config.max_image_bytes,
            timeout=config.image_timeout,
            max_redirects=config.image_redirects,
        )


def fetch(url: str, policy: MediaPolicy) -> bytes:
    """The bytes behind a URL that a client sent. Blocks for at most `policy.timeout`; safe to call from many threads.

    Raises ImageError: invalid_base64, request_too_large (data:); local_media_forbidden (file:);
    image_url_forbidden, image_fetch_timeout, image_fetch_failed (http, https); image_too_large;
    unsupported_url_scheme. Messages hold neither paths, queries nor credentials.
    """
    scheme, separator, _ = url[:32].partition(":")
    match scheme.lower() if separator else "":
        case "data":
            return _decode_data_url(url, policy.max_bytes)
        case "http" | "https" if policy.allow_http:
            from siglane.media.remote import get  # the HTTP client is needed only here

            return get(url, policy)
        case "http" | "https":
            raise ImageError("http and https media URLs are switched off here", code="image_url_forbidden")
        case "file":
            return _read_below(policy.allowed_local_root, url, policy.max_bytes)
    raise ImageError("the media URL must start with data:, https://, http:// or file://", code="unsupported_url_scheme")


def load_source(
    source: str | Path | bytes | Image.Image, policy: MediaPolicy, decode_config: DecodeConfig
) -> DecodedImage:
    """A picture named by a local caller: path, URL, the bytes of a file, or an open Pillow image.

    The caller may read whatever this process may, so paths and `file://` URLs are free of `policy`. Raises ImageError;
    image_not_found for a missing file, and every error of a file names it.
    """
    if isinstance(source, Image.Image):
        return from_pil(source, decode_config)
    return _read(source, policy, lambda data: decode(data, decode_config))


def load_video(
    source: str | Path | bytes, policy: MediaPolicy, rule: VideoRule, frames: int, decode_config: DecodeConfig
) -> DecodedVideo:
    """At most `frames` frames of a video named by a local caller, chosen by `rule`. Sources and errors as above."""
    return _read(source, policy, lambda data: decode_video(data, rule, frames, decode_config))


def _read(source: str | Path | bytes, policy: MediaPolicy, use: Callable[[bytes], Decoded]) -> Decoded:
    if isinstance(source, bytes):
        return use(source)
    if isinstance(source, str) and _URL.match(source):
        if not source.lower().startswith("file:"):
            return use(fetch(source, policy))
        source = unquote(urlsplit(source).path)
    with naming(source):
        with open_file(source) as file:
            data = file.read()
        return use(data)


def _decode_data_url(url: str, max_bytes: int) -> bytes:
    head = _DATA_URL.match(url)
    if head is None:
        raise ImageError("a data URL must have the form data:image/png;base64,…", code="invalid_base64")
    if (len(url) - head.end()) // 4 * 3 > max_bytes + 2:  # at most two bytes of padding
        raise ImageError(f"the file is larger than {max_bytes} bytes", code="request_too_large", status=413)
    try:
        return _b64decode(url[head.end() :].encode("ascii"))
    except ValueError:
        message = "the data URL is not valid base64 (standard alphabet, padded, no whitespace)"
        raise ImageError(message, code="invalid_base64") from None


def _b64decode(text: bytes) -> bytes:
    try:
        from pybase64 import b64decode  # several times faster, not always installed
    except ImportError:
        if len(text) % 4:  # the standard library lets surplus padding pass
            raise ValueError("wrong padding") from None
        return base64.b64decode(text, validate=True)
    return b64decode(text, validate=True)


def _read_below(root: Path | None, url: str, max_bytes: int) -> bytes:
    """A regular file below `root`. One answer to every other path, so that nobody learns which files exist."""
    if root is None:
        raise ImageError("file:// media URLs are switched off here", code="local_media_forbidden")
    try:
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise ValueError("a file on another host")
        base = root.resolve(strict=True)
        path = Path(unquote(parts.path))
        if not path.is_absolute():
            raise ValueError("a relative path")
        descriptor = _open_below(base, path.resolve(strict=True).relative_to(base).parts)
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError, RuntimeError):  # RuntimeError: a loop of symbolic links
        raise ImageError("not a file below the allowed folder", code="local_media_forbidden") from None
    if len(data) > max_bytes:
        raise ImageError(f"the file is larger than {max_bytes} bytes", code="image_too_large")
    return data


def _open_below(base: Path, parts: tuple[str, ...]) -> int:
    """Descriptor of a regular file, opened step by step without following links.

    The path has been resolved already; a link found now was put there to win a race.
    """
    descriptor = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
    for depth, name in enumerate(parts, start=1):
        # not blocking: a pipe without a writer would hold this thread for ever
        flags = os.O_RDONLY | os.O_NOFOLLOW | (os.O_NONBLOCK if depth == len(parts) else os.O_DIRECTORY)
        try:
            child = os.open(name, flags, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        descriptor = child
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("not a regular file")
    return descriptor
