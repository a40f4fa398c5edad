"""What a batch reads: OpenAI requests, pictures or Parquet tables."""

from __future__ import annotations

import glob
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siglane.errors import UserError
from siglane.settings.options import CommandOptions

if TYPE_CHECKING:
    from siglane.batch.parquet import Tables
    from siglane.batch.requests import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class InputOptions(CommandOptions):
    COMMAND = "batch"

    input: str = field(
        metadata={
            "help": "OpenAI batch requests (.jsonl); a folder or pattern of pictures; a Parquet table, a folder or "
            "pattern of them",
            "short": "-i",
        }
    )
    prompt: str | None = field(
        default=None,
        metadata={
            "help": "what every picture or row of a table is asked, there with {column} where its value stands",
            "short": "-p",
        },
    )
    body: str = field(default="{}", metadata={"help": "further fields of every such request: '{\"max_tokens\": 64}'"})
    image_column: str | None = field(
        default=None, metadata={"help": "of a table: where its pictures are; default: image, where there is one"}
    )
    id_column: str | None = field(
        default=None, metadata={"help": "of a table: its custom_ids; default: the row's number, from 1"}
    )
    keep: tuple[str, ...] = field(default=(), metadata={"help": "columns of a table that a Parquet output has too"})


def open_input(options: InputOptions, max_line: int, *, remote: bool, as_table: bool) -> tuple[Source, Tables | None]:
    """The rows, and the tables that they come from. remote: another server answers, which may have other urls;
    as_table: the output is Parquet."""
    from siglane.batch.parquet import Question, Tables, find_tables, import_pyarrow
    from siglane.batch.parquet_output import check_kept
    from siglane.batch.pictures import expand
    from siglane.batch.requests import URLS, ask_pictures, open_requests

    files = find_tables(options.input)
    if as_table:
        import_pyarrow()
    if options.keep and not as_table:
        message = (
            "--keep needs an output that ends with .parquet; OpenAI's JSON Lines have no columns: give them the "
            "table's ids (--id-column) and join by custom_id"
        )
        raise UserError(message, code="bad_option")
    if options.prompt is None:
        if files or not Path(options.input).is_file():
            many = bool(files) or Path(options.input).is_dir() or glob.has_magic(options.input)
            reason = "pictures and tables need a --prompt" if many else "no such file"
            raise UserError(f"cannot read {options.input}: {reason}", code="bad_input")
        _refuse_columns(options)
        return open_requests(Path(options.input), max_line, None if remote else URLS), None
    fields = _fields(options.body)
    if not files:
        _refuse_columns(options)
        return ask_pictures(expand(options.input), options.prompt, fields), None
    _check_alone(options.input)
    columns = {"image_column": options.image_column, "id_column": options.id_column}
    tables = Tables(files, Question(prompt=options.prompt, fields=fields, **columns), options.keep)
    check_kept(tables)
    return tables.source(), tables


def _fields(text: str) -> dict[str, Any]:
    import orjson

    try:
        fields = orjson.loads(text)
    except ValueError as error:
        raise UserError(f"--body is not JSON: {error}", code="bad_option") from error
    if not isinstance(fields, dict) or "messages" in fields:
        raise UserError("--body must be a JSON object without messages", code="bad_option")
    return fields


def _refuse_columns(options: InputOptions) -> None:
    for name in ("image_column", "id_column", "keep"):
        if getattr(options, name):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} names columns, and {options.input} is no Parquet table", code="bad_option")


def _check_alone(given: str) -> None:
    """Whether a folder's tables or its pictures are meant must not be guessed."""
    from siglane.batch.pictures import expand

    if not Path(given).is_dir():
        return
    try:
        expand(given)
    except UserError:
        return
    message = f"{given} holds pictures and Parquet tables; name one kind by a pattern, as {given}/*.parquet"
    raise UserError(message, code="bad_input")
