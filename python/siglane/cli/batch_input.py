"""What a batch reads: OpenAI requests, pictures or Parquet tables."""

from __future__ import annotations

import glob
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from siglane.batch.form import OPENAI
from siglane.batch.parquet import Question, Tables, find_tables, import_pyarrow
from siglane.batch.pictures import ask_pictures, expand
from siglane.batch.row import URLS, Source
from siglane.cli.rows import RowOptions, check_alone, check_kept, check_kept_has_table, refuse_columns
from siglane.errors import UserError
from siglane.settings.options import CommandOptions, described, option


class BatchCommand(CommandOptions):
    __slots__ = ()
    COMMAND = "batch"


@dataclass(frozen=True, slots=True, kw_only=True)
class InputOptions(BatchCommand):
    input: str = field(
        metadata=described(
            "OpenAI batch requests (.jsonl); a folder or pattern of pictures; a Parquet table, a folder or "
            "pattern of them",
            short="-i",
        )
    )
    prompt: str | None = option(
        None, "what every picture or row of a table is asked, there with {column} where its value stands", short="-p"
    )
    body: str = option("{}", "further fields of every such request: '{\"max_tokens\": 64}'")


def open_input(
    options: InputOptions, rows: RowOptions, max_line: int, *, remote: bool, as_table: bool
) -> tuple[Source, Tables | None]:
    """The rows, and the tables that they come from. remote: another server answers, which may have other urls;
    as_table: the output is Parquet."""
    from siglane.batch.requests import open_requests

    files = find_tables(options.input)
    if as_table:
        import_pyarrow()
    check_kept_has_table(rows, as_table)
    if options.prompt is None:
        if files or not Path(options.input).is_file():
            many = bool(files) or Path(options.input).is_dir() or glob.has_magic(options.input)
            reason = "pictures and tables need a --prompt" if many else "no such file"
            raise UserError(f"cannot read {options.input}: {reason}", code="bad_input")
        refuse_columns(rows, options.input)
        return open_requests(Path(options.input), max_line, None if remote else URLS), None
    fields = _fields(options.body)
    if not files:
        refuse_columns(rows, options.input)
        return ask_pictures(expand(options.input), options.prompt, fields), None
    check_alone(options.input)
    columns = {"image_column": rows.image_column, "id_column": rows.id_column}
    tables = Tables(files, Question(prompt=options.prompt, fields=fields, **columns), rows.keep)
    check_kept(tables, OPENAI)
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
