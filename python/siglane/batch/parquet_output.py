"""The answers of a finished batch as a Parquet table, made from its JSON Lines, which stay beside it: a batch is
continued by its lines, and a table is written once, whole.

    custom_id · the columns that were to be kept · answer · finish_reason · prompt_tokens · completion_tokens ·
    error_code · error_message · response
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from siglane.batch.keys import DiskMap
from siglane.batch.parquet import SUFFIX, Tables, import_pyarrow
from siglane.batch.requests import Source
from siglane.batch.rows import CannotWrite
from siglane.errors import UserError

COUNTS = ("prompt_tokens", "completion_tokens")
COLUMNS = ("custom_id", "answer", "finish_reason", *COUNTS, "error_code", "error_message", "response")
ROWS_AT_ONCE = 1024
GROUP_ROWS, GROUP_BYTES = 16384, 64 << 20  # of the output


class Journal(NamedTuple):
    """The lines that a table is made from."""

    answers: Path
    errors: Path


def journal_of(table: Path) -> Path:
    """Where the answers of a batch stand whose output is this table. UserError where the table is somebody else's."""
    journal = table.with_suffix(".jsonl")
    if table.exists() and not journal.exists():
        message = f"{table} is there and has no {journal.name} beside it; name another file"
        raise UserError(message, code="another_job")
    return journal


def check_kept(tables: Tables) -> None:
    """UserError for a column that would have the name of one of the answer's."""
    if taken := [name for name in tables.keep if name in COLUMNS]:
        raise UserError(f"--keep {taken[0]}: the output has a column of that name already", code="bad_option")


def write_table(
    path: Path, journal: Journal, source: Source, tables: Tables | None, holds: Callable[[int], bool], limit: int | None
) -> int:
    """Writes the rows of the input's order and returns how many. tables: the input where it is Parquet; holds, limit:
    the rows of the input that belong to the batch. CannotWrite when the disk refuses it, and leaves no table."""
    arrow, parquet = import_pyarrow()
    part, count = path.with_suffix(f"{SUFFIX}.part"), 0
    fields = [tables.schema.field(name) for name in tables.keep] if tables is not None else []
    schema = arrow.schema([("custom_id", arrow.string()), *fields, *((n, _kind(n, arrow)) for n in COLUMNS[1:])])
    try:
        with ExitStack() as stack:
            lines = _Lines(journal, stack)
            writer = stack.enter_context(parquet.ParquetWriter(part, schema))
            waiting: list[Any] = []
            seen = held = written = 0
            for numbers, ids, kept in _batches(source, tables):
                first = numbers if limit is None else numbers[: max(0, limit - seen)]
                seen += len(numbers)
                chosen = [at for at, number in enumerate(first) if holds(number)]
                records = [lines.find(numbers[at], ids[at]) for at in chosen]
                ours = {name: [record[name] for record in records] for name in COLUMNS}
                columns = [arrow.array(ours[name], schema.field(name).type) for name in COLUMNS]
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


def _kind(name: str, arrow: Any) -> Any:
    return arrow.int64() if name in COUNTS else arrow.string()


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
        self._files: list[BinaryIO] = []
        self._places: list[DiskMap] = []
        for path, key in zip(journal, ("custom_id", "line"), strict=True):
            file = stack.enter_context(path.open("rb"))
            places = DiskMap()
            stack.callback(places.close)
            start = 0
            for line in file:
                places.put(str(json.loads(line)[key]), start)
                start += len(line)
            self._files.append(file)
            self._places.append(places)

    def find(self, number: int, custom_id: str | None) -> dict[str, Any]:
        """The output's columns of a row."""
        (answers, errors), (answered, failed) = self._files, self._places
        if (start := failed.get(str(number))) is not None:
            return _columns(_line(errors, start))
        start = None if custom_id is None else answered.get(custom_id)
        if start is None:
            raise UserError(f"row {number} of the input has no answer; was the output changed?", code="another_job")
        return _columns(_line(answers, start))


def _line(file: BinaryIO, start: int) -> dict[str, Any]:
    file.seek(start)
    found: dict[str, Any] = json.loads(file.readline())
    return found


def _columns(line: dict[str, Any]) -> dict[str, Any]:
    columns = dict.fromkeys(COLUMNS) | {"custom_id": line["custom_id"]}
    if line["error"] is not None:
        columns |= {"error_code": line["error"]["code"], "error_message": line["error"]["message"]}
    body = line["response"]["body"] if line["response"] is not None else {}
    if line["response"] is not None:
        columns["response"] = json.dumps(body)
    if choices := body.get("choices"):
        columns["answer"] = choices[0].get("message", {}).get("content")
        columns["finish_reason"] = choices[0].get("finish_reason")
    if usage := body.get("usage"):
        columns |= {name: usage.get(name) for name in COUNTS}
    return columns
