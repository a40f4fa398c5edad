"""What `tag` and `embed` share: pictures as rows, one answer of a `Tagger` for each."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siglane.batch.form import Answer, PlainForm
from siglane.batch.parquet import IMAGES, Question, Tables, find_tables, import_pyarrow
from siglane.batch.pictures import ask_pictures, expand
from siglane.batch.row import BadRow, Row
from siglane.batch.stream import in_order
from siglane.cli.common import ModelOptions
from siglane.cli.rows import RowOptions, check_alone, check_kept, check_kept_has_table, is_table, refuse_columns
from siglane.errors import UserError
from siglane.settings.flags import read_options
from siglane.settings.media import DecodeOptions
from siglane.settings.tagging import TagSettings

if TYPE_CHECKING:
    from siglane.batch.output import Output
    from siglane.batch.row import Source
    from siglane.cli.batch_report import Report

NUMERICS = ("dtype", "quantization", "attention", "max_num_patches")


def open_pictures(
    given: Sequence[str], options: RowOptions, output: Path | None, field: str, *, once: bool = True
) -> tuple[Source, Tables | None, PlainForm]:
    """The pictures that a command's arguments name, of tables one in each row, and how their answers are written: what
    there is of each, by the name of `field`. output: None where nothing is written to a file; once: however often a
    picture is named."""
    as_table = output is not None and is_table(output)
    check_kept_has_table(options, as_table)
    files = [file for one in given for file in find_tables(one)]
    if not files:
        refuse_columns(options, " ".join(given))
        if as_table:
            import_pyarrow()
        names = [name for one in given for name in expand(one)]
        return ask_pictures(dict.fromkeys(names) if once else names, "", {}), None, PlainForm("image", field)
    for one in given:
        if not find_tables(one):
            raise UserError(f"{one} is no Parquet table, and {files[0]} is one; name one kind", code="bad_input")
        check_alone(one)
    question = Question(prompt="", fields={}, image_column=options.image_column or IMAGES, id_column=options.id_column)
    form = PlainForm("custom_id", field)
    tables = Tables(files, question, options.keep)
    tables.check_one_picture()
    check_kept(tables, form)
    return tables.source(), tables, form


def job_of(arguments: argparse.Namespace, settings: TagSettings) -> dict[str, Any]:
    """What a tagger's numbers depend on beside the pictures, by the names that a user knows. UserError for a model that
    cannot be found."""
    from siglane.weights.demo import open_model

    model = settings.required_model()
    named = asdict(read_options(ModelOptions, arguments))
    return {
        "model": model,
        "revision": named["revision"],
        "adapter": named["adapter"],
        "model_files": open_model(model, **named).digest(),
        **asdict(read_options(DecodeOptions, arguments)),
        **{name: getattr(settings, name) for name in NUMERICS},
    }


def write_in_order(
    rows: Iterable[Row | BadRow], answers: Callable[[Iterator[Row]], Iterable[Answer]], output: Output, report: Report
) -> None:
    with report:
        for row, answer in in_order(rows, answers):
            output.write(row, answer)
            report.note(row, answer)
    output.sync()


def line_of(row: Row | BadRow, answer: Answer | None, form: PlainForm) -> dict[str, Any]:
    """A row as it is printed: an error is its message."""
    if isinstance(row, BadRow):
        return {form.key: row.custom_id or str(row.number), "error": row.message}
    assert answer is not None
    if answer.status >= 400:
        return {form.key: row.custom_id, "error": answer.body["error"]["message"]}
    return form.answered(row, answer)


def refuse_without_rows(options: RowOptions) -> None:
    if options.max_errors is not None:
        message = "--max-errors needs rows in a file; name an output that ends with .jsonl or .parquet"
        raise UserError(message, code="bad_option")
