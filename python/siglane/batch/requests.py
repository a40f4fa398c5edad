"""OpenAI's batch JSON Lines as rows.

{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from siglane.batch.row import MAX_ID_CHARACTERS, URLS, BadRow, Row, Source, of_one_id
from siglane.errors import UserError

UTF8_MARK, OTHER_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
MEDIA = ("url", "image_url", "video_url", "image", "images")  # fields of a body that name pictures
SKIPPED_AT_ONCE = 1 << 20


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
