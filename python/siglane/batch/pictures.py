"""The pictures that a command's arguments name, and the same question about each."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from siglane.batch.row import CHAT, BadRow, Row, Source
from siglane.config.preprocess import PICTURE_SUFFIXES
from siglane.errors import UserError
from siglane.media.source import URL


def expand(given: str) -> list[str]:
    """The pictures that one argument names, in order: itself, those below a folder, or what a pattern matches.

    UserError for a folder or a pattern without pictures. A missing file stays: it is an error of its own row, and so is
    an empty folder that is called like a picture.
    """
    if URL.match(given):
        return [given]
    if os.path.isdir(given):
        found = sorted(_pictures_below(given))
        if not found and given.lower().endswith(PICTURE_SUFFIXES):
            return [given]
    elif os.path.exists(given) or not glob.has_magic(given):
        return [given]
    else:
        found = sorted(name for name in glob.glob(given, recursive=True) if os.path.isfile(name))
    if not found:
        suffixes = ", ".join(PICTURE_SUFFIXES)
        raise UserError(f"{given!r} holds no pictures; siglane looks for {suffixes}", code="no_pictures")
    return found


def _pictures_below(folder: str) -> Iterator[str]:
    for parent, folders, names in os.walk(folder, onerror=_say_unread):
        folders[:] = [name for name in folders if not name.startswith(".")]
        shown = [name for name in names if not name.startswith(".")]
        yield from (os.path.join(parent, name) for name in shown if name.lower().endswith(PICTURE_SUFFIXES))


def _say_unread(error: OSError) -> None:
    print(f"siglane: pictures below {error.filename} are left out: {error.strerror}", file=sys.stderr)


def ask_pictures(pictures: Iterable[str], prompt: str, fields: Mapping[str, Any]) -> Source:
    """The same question about each picture; its custom_id is the path. fields: of every request's body."""
    paths = list(pictures)
    message = {"role": "user", "content": [{"type": "text", "text": prompt}]}
    body = {**fields, "messages": [message]}
    digest = hashlib.sha256()
    for path in paths:
        digest.update(json.dumps([path, _size(path)]).encode())

    def read() -> Iterator[Row | BadRow]:
        return (Row(number, path, CHAT, body, 0, path, 1, (path,)) for number, path in enumerate(paths, 1))

    return Source(f"{len(paths)} pictures", digest.hexdigest(), len(paths), read)


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return None
