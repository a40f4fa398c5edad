"""Parquet tables as rows of a batch: a question about each row's pictures, with columns' values in it.

Reads and writes with pyarrow, an extra, which is imported when a table is opened.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from siglane.batch.row import CHAT, MAX_ID_CHARACTERS, BadRow, Row, Source, of_one_id
from siglane.errors import UserError
from siglane.media.source import URL

SUFFIX = ".parquet"
IMAGES = "image"  # the column of pictures where none is named
ROWS_AT_ONCE = 32  # decompressed at one time; their pictures may have megabytes each
READ_AT_ONCE = 1 << 20  # so that a row group is never held as a whole


def import_pyarrow() -> tuple[Any, Any]:
    """pyarrow and its Parquet module. UserError where they are not installed."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        message = f"Parquet needs one more package ({error}); pip install 'siglane[parquet]'"
        raise UserError(message, code="missing_extra") from error
    return pyarrow, parquet


def find_tables(given: str) -> list[str]:
    """The Parquet files that one argument names, in order of their names: itself, those below a folder, or what a
    pattern matches. Hidden ones and those that begin with _ are left out, as Spark and Hive do."""
    if os.path.isdir(given):
        names = glob.glob("**/*" + SUFFIX, root_dir=given, recursive=True)
        shown = [name for name in names if not any(part.startswith("_") for part in Path(name).parts)]
        return [os.path.join(given, name) for name in sorted(shown)]
    if os.path.exists(given) or not glob.has_magic(given):
        return [given] if given.endswith(SUFFIX) else []
    return sorted(name for name in glob.glob(given, recursive=True) if name.endswith(SUFFIX))


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What every row of a table is asked. prompt: with `{column}` where a value stands, braces doubled; fields: of
    every body; image_column: None for `image`, where there is one; id_column: None for the row's number, from 1."""

    prompt: str
    fields: Mapping[str, Any]
    image_column: str | None = None
    id_column: str | None = None

    def parts(self) -> list[tuple[str, str | None]]:
        """Texts, each with the column that follows it. UserError for braces that are no column."""
        try:
            found = list(Formatter().parse(self.prompt))
        except ValueError as error:
            message = f"--prompt {self.prompt!r}: {error}; braces name a column, {{{{ and }}}} are braces"
            raise UserError(message, code="bad_option", param="prompt") from error
        for _, name, spec, conversion in found:
            if spec or conversion:
                message = f"--prompt: {{{name}}} takes no format; a column's value stands as it is"
                raise UserError(message, code="bad_option", param="prompt")
        return [(text, name) for text, name, _, _ in found]


class Tables:
    """Parquet files with the columns that a question needs. UserError for a file that is none, and names the column
    that is missing or cannot be used."""

    def __init__(self, files: list[str], question: Question, keep: Collection[str] = ()) -> None:
        self._arrow, self._parquet = import_pyarrow()
        self.files, self.question, self.keep, self.count = files, question, list(dict.fromkeys(keep)), 0
        self._parts = question.parts()
        prompted = [name for _, name in self._parts if name is not None]
        digest = hashlib.sha256()
        for number, file in enumerate(files):
            with self._open(file) as table:
                digest.update(f"{os.path.basename(file)} {os.stat(file).st_size} ".encode() + _footer(file))
                schema = table.schema_arrow
                self.count += table.metadata.num_rows
            if number == 0:
                self.schema = schema
                self.images = self._image_column(prompted)
            for name in self._columns(prompted) + self.keep:
                self._check(name, schema, file, prompted)
        self.digest = digest.hexdigest()

    def check_one_picture(self) -> None:
        """UserError where a row may have several pictures."""
        kind, types = self.schema.field(self.images).type, self._arrow.types
        if types.is_list(kind) or types.is_large_list(kind):
            message = f"column {self.images!r} of {self.files[0]} holds {kind}; a row may have one picture here"
            raise UserError(message, code="bad_column")

    def source(self) -> Source:
        return Source(self.files[0], self.digest, self.count, lambda: of_one_id(self._rows()))

    def batches(self, columns: Collection[str], rows_at_once: int) -> Iterator[tuple[str, int, Any]]:
        """(file, number of the first row, record batch), of some columns; none of them gives batches without any."""
        number = 1
        for file in self.files:
            with self._open(file) as table:
                for batch in table.iter_batches(batch_size=rows_at_once, columns=list(columns)):
                    yield file, number, batch
                    number += batch.num_rows

    def _columns(self, prompted: list[str]) -> list[str]:
        return list(
            dict.fromkeys(name for name in (*prompted, self.images, self.question.id_column) if name is not None)
        )

    def _image_column(self, prompted: list[str]) -> str | None:
        named, names = self.question.image_column, self.schema.names
        if named is None and IMAGES not in names and not prompted:
            message = (
                f"{self.files[0]} has no column {IMAGES!r} and --prompt names none; give --image-column, or a "
                f"{{column}} in --prompt; its columns are {', '.join(names)}"
            )
            raise UserError(message, code="missing_column")
        return named or (IMAGES if IMAGES in names else None)

    def _check(self, name: str, schema: Any, file: str, prompted: list[str]) -> None:
        if name not in schema.names:
            message = f"{file} has no column {name!r}; its columns are {', '.join(schema.names)}"
            raise UserError(message, code="missing_column")
        kind, types = schema.field(name).type, self._arrow.types
        if name == self.images and not self._holds_pictures(kind):
            message = f"column {name!r} of {file} holds {kind}; pictures are bytes, paths, or {{bytes, path}}"
            raise UserError(message, code="bad_column")
        if name in prompted and (types.is_binary(kind) or types.is_large_binary(kind) or types.is_struct(kind)):
            message = f"column {name!r} of {file} holds {kind}, which is no text for the prompt"
            raise UserError(message, code="bad_column")

    def _holds_pictures(self, kind: Any) -> bool:
        types = self._arrow.types
        if types.is_list(kind) or types.is_large_list(kind):
            return self._holds_pictures(kind.value_type)
        if types.is_struct(kind):
            return bool({"bytes", "path"} & {kind.field(place).name for place in range(kind.num_fields)})
        plain = (types.is_binary, types.is_large_binary, types.is_string, types.is_large_string, types.is_null)
        return any(one(kind) for one in plain) or bool(types.is_dictionary(kind) and types.is_string(kind.value_type))

    @contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        try:
            with self._parquet.ParquetFile(file, buffer_size=READ_AT_ONCE, pre_buffer=False) as table:
                yield table
        except (OSError, self._arrow.ArrowException) as error:
            raise UserError(f"cannot read {file}: {error}", code="bad_input") from error

    def _rows(self) -> Iterator[Row | BadRow]:
        columns = self._columns([name for _, name in self._parts if name is not None])
        for file, first, batch in self.batches(columns, ROWS_AT_ONCE):
            for number, record in enumerate(batch.to_pylist(), first):
                yield self._row_of(number, record, os.path.dirname(file))

    def _row_of(self, number: int, record: Mapping[str, Any], folder: str) -> Row | BadRow:
        given = number if self.question.id_column is None else record[self.question.id_column]
        custom_id = "" if given is None else str(given)
        if not 0 < len(custom_id) <= MAX_ID_CHARACTERS:
            message = f"{self.question.id_column} must be a text of 1 to {MAX_ID_CHARACTERS} characters"
            return BadRow(number, "missing_custom_id" if given is None else "invalid_custom_id", message)
        text = ""
        for literal, name in self._parts:
            text += literal
            if name is not None:
                if record[name] is None:
                    return BadRow(number, "missing_value", f"column {name!r} is null", custom_id)
                text += _text_of(record[name])
        pictures = () if self.images is None else tuple(_pictures(record[self.images], folder))
        if self.images is not None and (None in pictures or not pictures):
            return BadRow(number, "missing_value", f"column {self.images!r} holds no picture", custom_id)
        found = tuple(one for one in pictures if one is not None)
        body = {**self.question.fields, "messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]}
        size = len(text) + sum(len(one) for one in found)
        return Row(number, custom_id, CHAT, body, size, _key(found), len(found), found)


def _footer(file: str) -> bytes:
    """A table's own description: names, places and sizes of all its columns, and their least and largest values. Stands
    for the whole file, which may have terabytes."""
    with open(file, "rb") as opened:
        opened.seek(max(0, os.stat(file).st_size - 8))
        length = int.from_bytes(opened.read(4), "little")
        opened.seek(max(0, os.stat(file).st_size - 8 - length))
        return opened.read()


def _pictures(value: Any, folder: str) -> Iterator[str | bytes | None]:
    """Of a cell: bytes, a path below the table's folder, a URL, Hugging Face's `{bytes, path}`, or a list of these."""
    if isinstance(value, list):
        for one in value:
            yield from _pictures(one, folder)
        return
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value and not URL.match(value):
        value = os.path.join(folder, value)
    yield value or None


def _text_of(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list) else str(value)


def _key(pictures: tuple[str | bytes, ...]) -> str:
    if not pictures:
        return ""
    digest = hashlib.sha256()
    for one in pictures:
        data = one.encode("utf-8", "surrogatepass") if isinstance(one, str) else one
        digest.update(f"{len(data)} ".encode() + data)
    return digest.hexdigest()
