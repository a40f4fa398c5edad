"""A row of a batch, whatever it was read from and whoever answers it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from siglane.batch.keys import DiskSet
from siglane.image.signature import format_of
from siglane.media.source import URL, naming, read_file

CHAT, COMPLETIONS, DECISIONS, SYSTEMONE = "/v1/chat/completions", "/v1/completions", "/v1/decisions", "/v1/systemone"
EMBEDDINGS, CLASSIFY, SCORE, PAIRS = "/v1/embeddings", "/v1/classify", "/v1/score", "/score"
OF_CHAT = (CHAT, COMPLETIONS, DECISIONS, SYSTEMONE, SCORE)  # answered by a language model, one row after the other
SEEDED = (CHAT, COMPLETIONS)
URLS = (*OF_CHAT, EMBEDDINGS, CLASSIFY)
MAX_ID_CHARACTERS = 512  # OpenAI's own limit is 64


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


def of_one_id(rows: Iterable[Row | BadRow]) -> Iterator[Row | BadRow]:
    """A row whose custom_id an earlier one has is bad."""
    with closing(DiskSet()) as seen:
        for row in rows:
            if row.custom_id is not None and not seen.add(row.custom_id):
                row = BadRow(row.number, "duplicate_custom_id", "an earlier row has this custom_id", row.custom_id)
            yield row
