"""The rows of a batch: OpenAI's batch JSON Lines, or pictures that are all asked the same.

{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from siglane.batch.keys import DiskSet
from siglane.errors import UserError
from siglane.image.decode import format_of
from siglane.media.source import URL, naming, read_file

CHAT, EMBEDDINGS, CLASSIFY = "/v1/chat/completions", "/v1/embeddings", "/v1/classify"
URLS = (CHAT, EMBEDDINGS, CLASSIFY)
UTF8_MARK, OTHER_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
MAX_ID_CHARACTERS = 512  # OpenAI's own limit is 64
MEDIA = ("url", "image_url", "video_url", "image", "images")  # fields of a body that name pictures
SKIPPED_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """A request that can be asked. number: of its line or picture, from 1; size: bytes that it holds in memory; key:
    equal for rows that are best asked next to each other, "" for none; images: how many media it names; pictures: to
    be put in front of the body's text, each a file's path, its bytes, or a URL."""

    number: int
    custom_id: str
    url: str
    body: Mapping[str, Any]
    size: int
    key: str
    images: int = 0
    pictures: tuple[str | bytes, ...] = ()

    def read(self) -> Mapping[str, Any]:
        """The body with its pictures. Raises ImageError when one cannot be read."""
        if not self.pictures:
            return self.body
        images = [{"type": "image_url", "image_url": {"url": _url_of(picture)}} for picture in self.pictures]
        (message,) = self.body["messages"]
        return {**self.body, "messages": [{**message, "content": [*images, *message["content"]]}]}


def _url_of(picture: str | bytes) -> str:
    if isinstance(picture, str):
        if URL.match(picture):
            return picture
        with naming(picture):
            picture = read_file(picture)
    kind = (format_of(picture) or "any").lower()
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be asked. custom_id: where it has one that is its own or another row's."""

    number: int
    code: str
    message: str
    custom_id: str | None = None
    images: int = 0


@dataclass(slots=True)
class Source:
    """The rows of one input. digest: of all that the answers are made from, count: of the rows (a blank line is none);
    what the input is called in messages: name; read: its rows from the first one on."""

    name: str
    digest: str
    count: int
    read: Callable[[], Iterator[Row | BadRow]] = field(repr=False)

    @property
    def rows(self) -> Iterator[Row | BadRow]:
        return self.read()


def open_requests(path: Path, max_line: int, urls: Collection[str] | None = URLS) -> Source:
    """A file of OpenAI requests. max_line: bytes of one line, longer ones are bad rows and never held in memory; urls:
    that can be asked, None for all below /v1/.

    Raises UserError for a file that cannot be read or is not UTF-8 at all.
    """
    with _open(path) as file:
        if file.peek(2)[:2] in OTHER_MARKS:
            raise UserError(f"{path} is UTF-16; save it as UTF-8", code="bad_input")
        digest, count = _measure(file)
    return Source(str(path), digest, count, lambda: of_one_id(_read_requests(path, max_line, urls)))


@contextmanager
def _open(path: Path) -> Iterator[io.BufferedReader]:
    """UserError where the system cannot open or read it."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", code="bad_input") from error


def of_one_id(rows: Iterable[Row | BadRow]) -> Iterator[Row | BadRow]:
    """A row whose custom_id an earlier one has is bad."""
    with closing(DiskSet()) as seen:
        for row in rows:
            if row.custom_id is not None and not seen.add(row.custom_id):
                row = BadRow(row.number, "duplicate_custom_id", "an earlier row has this custom_id", row.custom_id)
            yield row


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


def _measure(file: BinaryIO) -> tuple[str, int]:
    """sha256 of the whole file, and its lines that are not blank."""
    digest, count, blank = hashlib.sha256(), 0, True
    while block := file.read(SKIPPED_AT_ONCE):
        digest.update(block)
        first, *rest = block.split(b"\n")
        blank = blank and not first.strip()
        for line in rest:
            count += not blank
            blank = not line.strip()
    return digest.hexdigest(), count + (not blank)


def _read_requests(path: Path, max_line: int, urls: Collection[str] | None) -> Iterator[Row | BadRow]:
    with _open(path) as file:
        for number, line in _lines(file, max_line):
            if line is None:
                yield BadRow(number, "line_too_long", f"the line has more than {max_line} bytes")
                continue
            if number == 1:
                line = line.removeprefix(UTF8_MARK)
            if line.strip():
                yield _row_of(number, line, urls)


def _lines(file: BinaryIO, max_line: int) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines; None for one that is too long."""
    number = 0
    while line := file.readline(max_line + 1):
        number += 1
        if len(line) <= max_line or line.endswith(b"\n"):
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(SKIPPED_AT_ONCE)
        yield number, None


def _row_of(number: int, line: bytes, urls: Collection[str] | None) -> Row | BadRow:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return BadRow(number, "invalid_json", f"not JSON: {error.msg} at column {error.colno}")
    if not isinstance(row, dict):
        return BadRow(number, "invalid_json", "not a JSON object")
    custom_id = row.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID_CHARACTERS:
        message = f"custom_id must be a text of 1 to {MAX_ID_CHARACTERS} characters"
        return BadRow(number, "missing_custom_id" if custom_id is None else "invalid_custom_id", message)
    method, url, body = row.get("method", "POST"), row.get("url"), row.get("body")
    if method != "POST":
        return BadRow(number, "invalid_method", "method must be POST", custom_id)
    if not isinstance(url, str) or (url not in urls if urls is not None else not url.startswith("/v1/")):
        known = "begin with /v1/" if urls is None else f"be one of {', '.join(urls)}"
        return BadRow(number, "invalid_url", f"url must {known}", custom_id)
    if not isinstance(body, dict):
        return BadRow(number, "invalid_body", "body must be a JSON object", custom_id)
    pictures = list(pictures_of(body))
    return Row(number, custom_id, url, body, len(line), _key(body, pictures), len(pictures))


def _key(body: Mapping[str, Any], pictures: list[str]) -> str:
    """By its pictures; without any, by all messages but the last."""
    found = pictures
    messages = body.get("messages")
    if not found and isinstance(messages, list) and len(messages) > 1:
        found = [orjson.dumps(messages[:-1]).decode()]
    if not found:
        return ""
    return hashlib.sha256(orjson.dumps(found)).hexdigest()


def pictures_of(value: Any, name: str = "") -> Iterator[str]:
    """Every text of the body under one of the names in MEDIA."""
    if isinstance(value, str):
        if name in MEDIA:
            yield value
    elif isinstance(value, dict):
        for inner, one in value.items():
            yield from pictures_of(one, inner)
    elif isinstance(value, list):
        for one in value:
            yield from pictures_of(one, name)
