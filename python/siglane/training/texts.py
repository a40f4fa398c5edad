"""The text that a file of captions holds: UTF-8, or what its byte order mark says. Nothing is guessed or replaced."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from siglane.text.tokens import is_unicode

# the longer mark first: UTF-32's begins with UTF-16's
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(data: bytes) -> str:
    """ValueError for bytes that are no text in the encoding their first ones state."""
    encoding = _encoding(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        raise ValueError(_not(encoding)) from None
    if "\0" in text:  # UTF-16 without its mark is valid UTF-8, with a NUL beside every letter
        raise ValueError(_not(encoding))
    return text


def read_lines(file: Path) -> Iterator[str | ValueError]:
    """The lines of a file, an error for each that is no text in the file's encoding."""
    with file.open("rb") as opened:
        encoding = _encoding(opened.read(4))
    # bytes that are no UTF-8 become half surrogate pairs, and so do UTF-16's own halves: neither can be encoded again
    errors = "surrogateescape" if encoding == "utf-8-sig" else "surrogatepass"
    with file.open(encoding=encoding, errors=errors) as lines:
        try:
            for line in lines:
                yield line if is_unicode(line) and "\0" not in line else ValueError(_not(encoding))
        except UnicodeDecodeError:
            yield ValueError(f"{_not(encoding)} from here on")


def _encoding(head: bytes) -> str:
    return next((encoding for mark, encoding in MARKS if head.startswith(mark)), "utf-8-sig")


def _not(encoding: str) -> str:
    return f"not {encoding.removesuffix('-sig').upper()} text"
