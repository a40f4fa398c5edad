"""What commands share that read rows from a file and write them to a file: `batch`, `tag` and `embed`."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from siglane.batch.form import OPENAI, Form
from siglane.batch.output import Output, Stopped
from siglane.batch.parquet import SUFFIX, Tables
from siglane.batch.pictures import expand
from siglane.batch.rows import CannotWrite
from siglane.cli.batch_report import Report
from siglane.errors import UserError
from siglane.settings.options import CommandOptions, option

if TYPE_CHECKING:
    from siglane.batch.row import BadRow, Row, Source

SHARD = re.compile(r"([1-9]\d*)/([1-9]\d*)")
COLUMNS = ("image_column", "id_column", "keep")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOptions(CommandOptions):
    """Of whatever reads and writes rows."""

    limit: int | None = option(None, "only the first so many rows of the input")
    shard: str | None = option(None, "I/N: every N-th row, from the I-th on")
    max_errors: int | None = option(None, "stop when more rows fail; none: never")
    image_column: str | None = option(None, "of a table: where its pictures are; default: image, where there is one")
    id_column: str | None = option(None, "of a table: its custom_ids; default: the row's number, from 1")
    keep: tuple[str, ...] = option((), "columns of a table that a Parquet output has too")

    def __post_init__(self) -> None:
        if self.shard is not None:
            found = SHARD.fullmatch(self.shard)
            if found is None or int(found[1]) > int(found[2]):
                raise UserError(f"--shard {self.shard!r} is not I/N with I from 1 to N", code="bad_option")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit must be at least 1, got {self.limit}", code="bad_option")
        if self.max_errors is not None and self.max_errors < 0:
            raise UserError(f"--max-errors must not be negative, got {self.max_errors}", code="bad_option")

    def holds(self, number: int) -> bool:
        """Whether row `number`, from 1, is one of this shard's."""
        if self.shard is None:
            return True
        index, shards = map(int, self.shard.split("/"))
        return number % shards == index % shards

    def chosen(self, source: Source) -> Iterator[Row | BadRow]:
        return (row for row in islice(source.rows, self.limit) if self.holds(row.number))


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Rows, and where their answers go. output: a file of JSON Lines or a table; source: what is read, tables: where
    that is Parquet; job: what the answers depend on beside the source; as_json: how the summary is printed."""

    output: Path
    options: RowOptions
    source: Source
    tables: Tables | None
    job: Mapping[str, Any]
    form: Form = OPENAI
    as_json: bool = False

    @property
    def as_table(self) -> bool:
        return is_table(self.output)

    @property
    def lines(self) -> Path:
        """Where the answers stand as JSON Lines."""
        if not self.as_table:
            return self.output
        from siglane.batch.parquet_output import journal_of

        return journal_of(self.output)


Answering = Callable[["Iterator[Row | BadRow]", Output, Report], None]


def is_table(output: Path) -> bool:
    return output.suffix.lower() == SUFFIX


def write_rows(task: Task, answer: Answering, out: TextIO) -> int:
    """Continues what an earlier run has written, prints the summary and returns the exit code.

    answer: writes the rows that are left; it is not called where none are, so that no model is loaded.
    """
    job = {"input": task.source.digest, **task.job, "shard": task.options.shard}
    job |= {name: getattr(task.options, name) for name in ("image_column", "id_column")}
    with Output(task.lines, job, task.form, max_errors=task.options.max_errors) as output:
        report = Report(output, task.source, output.found)
        rows = (row for row in task.options.chosen(task.source) if not output.has(row))
        first = next(rows, None)
        if first is not None:
            before = signal.signal(signal.SIGTERM, signal.default_int_handler)
            try:
                answer(chain([first], rows), output, report)
            except KeyboardInterrupt:
                report.stopped = "stopped by a signal; the same command continues"
            except (CannotWrite, Stopped) as error:
                report.stopped = str(error)
            finally:
                signal.signal(signal.SIGTERM, before)
        if task.as_table and report.stopped is None:
            _write_table(task, output, report)
        return report.close(out, as_json=task.as_json)


def _write_table(task: Task, output: Output, report: Report) -> None:
    from siglane.batch.parquet_output import Journal, write_table

    journal, options = Journal(output.path, output.errors_path, task.form), task.options
    try:
        report.table_rows = write_table(task.output, journal, task.source, task.tables, options.holds, options.limit)
    except CannotWrite as error:
        report.stopped = str(error)


def check_kept(tables: Tables, form: Form) -> None:
    """UserError for a column that would have the name of one of the answer's."""
    if taken := [name for name in tables.keep if name in (form.key, *form.columns)]:
        raise UserError(f"--keep {taken[0]}: the output has a column of that name already", code="bad_option")


def check_kept_has_table(options: RowOptions, as_table: bool) -> None:
    if options.keep and not as_table:
        message = "--keep needs a Parquet output, JSON Lines have no columns: name one that ends with .parquet, or join"
        raise UserError(f"{message} by the rows' ids (--id-column)", code="bad_option")


def refuse_columns(options: RowOptions, given: str) -> None:
    for name in COLUMNS:
        if getattr(options, name):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} names columns, and {given} is no Parquet table", code="bad_option")


def check_alone(given: str) -> None:
    """Whether a folder's tables or its pictures are meant must not be guessed."""
    if not Path(given).is_dir():
        return
    try:
        expand(given)
    except UserError:
        return
    message = f"{given} holds pictures and Parquet tables; name one kind by a pattern, as {given}/*.parquet"
    raise UserError(message, code="bad_input")
