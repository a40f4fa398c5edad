"""Where pictures and videos come from: data URLs, web servers, files.

Everything a stranger may ask for passes through `fetch`.
"""

from __future__ import annotations

import base64
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote_to_bytes, urlsplit

from siglane.errors import ImageError
from siglane.media.policy import MediaPolicy

URL = re.compile(r"data:|[a-z][a-z0-9+.-]*://", re.IGNORECASE)
LONGEST_NAME, SHOWN = 4096, 60  # characters: no system has longer paths
LOCAL_TENANT = ""  # of all that one program fetches for itself
_DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


def fetch(url: str, policy: MediaPolicy, tenant: str | None = None) -> bytes:
    """The bytes behind a URL that a client sent. Blocks for at most `policy.timeout`; safe to call from many threads.

    tenant: whose clients share a download, None where that is not known and nothing is shared.
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

            return get(url, policy, tenant)
        case "http" | "https":
            raise ImageError("http and https media URLs are switched off here", code="image_url_forbidden")
        case "file":
            return _read_below(policy.allowed_local_root, url, policy.max_bytes)
    raise ImageError("the media URL must start with data:, https://, http:// or file://", code="unsupported_url_scheme")


def local_path(source: object) -> str | Path | None:
    """The file that a local caller's source names, by its path or a `file:` URL; None for any other source."""
    if not isinstance(source, str):
        return source if isinstance(source, Path) else None
    if not URL.match(source):
        return source
    return _path_of(source) if source.lower().startswith("file:") else None


def _path_of(url: str) -> str:
    """Of a `file:` URL. Names are bytes: what is not UTF-8 comes back as the system gives it, in half surrogates."""
    try:
        return os.fsdecode(unquote_to_bytes(os.fsencode(urlsplit(url).path)))
    except ValueError:  # no file is called so
        return url


def read_local(source: str | Path, policy: MediaPolicy) -> bytes:
    """The bytes of a path or URL that a local caller names: whatever this process may read, so that paths and `file://`
    URLs are free of `policy`. Raises ImageError as `fetch` and `open_file`."""
    path = local_path(source)
    if path is None:
        return fetch(str(source), policy, LOCAL_TENANT)
    return read_file(path)


def read_file(path: str | Path, start: int = 0, size: int = -1) -> bytes:
    """`size` bytes of a local file from `start`, -1 for all. Raises ImageError as `open_file`, and for a disk that
    fails while it is read."""
    with open_file(path) as file:
        try:
            file.seek(start)
            return file.read(size)
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror}", code="image_not_found") from None


def open_file(path: str | Path) -> BinaryIO:
    """A local file for reading. Raises ImageError image_not_found when there is none, or none that can be read."""
    try:
        return open(path, "rb")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a usable path"
        raise ImageError(f"cannot be read: {reason}", code="image_not_found") from None


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Puts the name of a local file in front of what went wrong with it; one that is none, such as a whole picture in
    base64, is cut."""
    try:
        yield
    except ImageError as error:
        name = str(path) if len(str(path)) <= LONGEST_NAME else f"{str(path)[:SHOWN]}…"
        raise ImageError(f"{name}: {error.message}", code=error.code) from None


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
        path = Path(_path_of(url))
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
