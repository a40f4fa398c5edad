"""The answers of a finished batch as a Parquet table, made from its JSON Lines, which stay beside it: a batch is
continued by its lines, and a table is written once, whole.

    custom_id · the columns that were to be kept · those of its form: answer, finish_reason, prompt_tokens,
    completion_tokens, error_code, error_message, response
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from siglane.batch.form import OPENAI, Form
from siglane.batch.keys import DiskMap
from siglane.batch.parquet import SUFFIX, Tables, import_pyarrow
from siglane.batch.row import Source
from siglane.batch.rows import CannotWrite
from siglane.errors import UserError

ROWS_AT_ONCE = 1024
GROUP_ROWS, GROUP_BYTES = 16384, 64 << 20  # of the output


class Journal(NamedTuple):
    """The lines that a table is made from."""

    answers: Path
    errors: Path
    form: Form = OPENAI


def journal_of(table: Path) -> Path:
    """Where the answers of a batch stand whose output is this table. UserError where the table is somebody else's."""
    journal = table.with_suffix(".jsonl")
    if table.exists() and not journal.exists():
        message = f"{table} is there and has no {journal.name} beside it; name another file"
        raise UserError(message, code="another_job")
    return journal


def write_table(
    path: Path, journal: Journal, source: Source, tables: Tables | None, holds: Callable[[int], bool], limit: int | None
) -> int:
    """Writes the rows of the input's order and returns how many. tables: the input where it is Parquet; holds, limit:
    the rows of the input that belong to the batch. CannotWrite when the disk refuses it, and leaves no table."""
    arrow, parquet = import_pyarrow()
    part, count = path.with_suffix(f"{SUFFIX}.part"), 0
    try:
        with ExitStack() as stack:
            lines = _Lines(journal, stack)
            schema = _schema(arrow, journal.form, lines.first, tables)
            writer = stack.enter_context(parquet.ParquetWriter(part, schema))
            waiting: list[Any] = []
            seen = held = written = 0
            for numbers, ids, kept in _batches(source, tables):
                first = numbers if limit is None else numbers[: max(0, limit - seen)]
                seen += len(numbers)
                chosen = [at for at, number in enumerate(first) if holds(number)]
                records = [lines.find(numbers[at], ids[at]) for at in chosen]
                names = (journal.form.key, *journal.form.columns)
                columns = [arrow.array([one.get(name) for one in records], schema.field(name).type) for name in names]
                between = [] if kept is None else kept.take(arrow.array(chosen, arrow.int64())).columns
                waiting.append(arrow.RecordBatch.from_arrays([columns[0], *between, *columns[1:]], schema=schema))
                count, held = count + len(chosen), held + waiting[-1].nbytes
                if count - written >= GROUP_ROWS or held >= GROUP_BYTES:
                    writer.write_table(arrow.Table.from_batches(waiting, schema))
                    waiting, held, written = [], 0, count
            if waiting:
                writer.write_table(arrow.Table.from_batches(waiting, schema))
        _replace(part, path)
    except (OSError, arrow.ArrowException) as error:
        part.unlink(missing_ok=True)
        raise CannotWrite(f"cannot write {path}: {error}; the same command continues") from error
    return count


def _schema(arrow: Any, form: Form, first: dict[str, Any] | None, tables: Tables | None) -> Any:
    kept = [tables.schema.field(name) for name in tables.keep] if tables is not None else []
    kinds = form.kinds(arrow, first)
    return arrow.schema([(form.key, arrow.string()), *kept, *zip(form.columns, kinds, strict=True)])


def _replace(part: Path, path: Path) -> None:
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


def _batches(source: Source, tables: Tables | None) -> Iterator[tuple[list[int], list[str | None], Any]]:
    """(numbers, custom_ids, columns that are kept) of all rows of the input."""
    if tables is None:
        numbers: list[int] = []
        ids: list[str | None] = []
        for row in source.rows:
            numbers.append(row.number)
            ids.append(row.custom_id)
            if len(numbers) == ROWS_AT_ONCE:
                yield numbers, ids, None
                numbers, ids = [], []
        yield numbers, ids, None
        return
    column = tables.question.id_column
    for _, first, batch in tables.batches(dict.fromkeys([*tables.keep, *([column] if column else [])]), ROWS_AT_ONCE):
        numbers = list(range(first, first + batch.num_rows))
        given = numbers if column is None else batch.column(column).to_pylist()
        yield numbers, [None if one is None else str(one) for one in given], batch.select(tables.keep)


class _Lines:
    """Lines of the journal, found by their row."""

    def __init__(self, journal: Journal, stack: ExitStack) -> None:
        self._form = journal.form
        self._files: list[BinaryIO] = []
        self._places: list[DiskMap] = []
        for path, key in ((journal.answers, journal.form.key), (journal.errors, "line")):
            file = stack.enter_context(path.open("rb"))
            places = DiskMap()
            stack.callback(places.close)
            start = 0
            for line in file:
                places.put(str(json.loads(line)[key]), start)
                start += len(line)
            self._files.append(file)
            self._places.append(places)
        self._files[0].seek(0)
        line = self._files[0].readline()
        self.first: dict[str, Any] | None = json.loads(line) if line else None  # of the answers

    def find(self, number: int, custom_id: str | None) -> dict[str, Any]:
        """The output's columns of a row."""
        (answers, errors), (answered, failed) = self._files, self._places
        if (start := failed.get(str(number))) is not None:
            return self._values(_line(errors, start))
        start = None if custom_id is None else answered.get(custom_id)
        if start is None:
            raise UserError(f"row {number} of the input has no answer; was the output changed?", code="another_job")
        return self._values(_line(answers, start))

    def _values(self, line: dict[str, Any]) -> dict[str, Any]:
        return {self._form.key: line[self._form.key], **self._form.values(line)}


def _line(file: BinaryIO, start: int) -> dict[str, Any]:
    file.seek(start)
    found: dict[str, Any] = json.loads(file.readline())
    return found
