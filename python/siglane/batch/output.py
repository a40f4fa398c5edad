"""The two files of a batch, answers and errors, and the job that they belong to. As OpenAI writes them:

    answers.jsonl            {"id", "custom_id", "response": {"status_code": 200, "request_id", "body"}, "error": null}
    answers.errors.jsonl     {"id", "custom_id", "response" or null, "error": {"code", "message"}, "line"}
    answers.manifest.json    what the job is: another one is refused

Both files hold whole lines only, at any time. What they hold is done; all else is asked again.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

from siglane.batch.form import OPENAI, Answer, Form
from siglane.batch.keys import DiskSet
from siglane.batch.row import BadRow, Row
from siglane.batch.rows import CannotWrite, RowFile
from siglane.errors import SiglaneError, UserError

SYNC_SECONDS = 2.0


class Stopped(SiglaneError):
    """A batch that ended before its last row; the same command continues it."""

    exit_code = 3


class Output:
    """Where answers are written, each once. UserError when the files belong to another job, or cannot be had.

    max_errors: rows that may fail in this run before it stops, None for all; failures: how many have, by code.
    """

    def __init__(
        self, path: Path, job: Mapping[str, Any], form: Form = OPENAI, *, max_errors: int | None = None
    ) -> None:
        if path.is_dir():
            raise UserError(f"cannot write {path}: it is a folder", code="cannot_write")
        self.path, self.errors_path = path, path.with_name(f"{path.stem}.errors{path.suffix}")
        self._form, self._max_errors = form, max_errors
        self.failures: Counter[str] = Counter()
        self._synced = time.monotonic()
        with ExitStack() as stack:
            # the answers' file first: who has it has the others
            self._answers = stack.enter_context(
                RowFile(path, form.key, self._keys(stack), owned=_manifest(path).exists())
            )
            check_job(path, job, self._answers.rows)
            self._errors = stack.enter_context(RowFile(self.errors_path, "line", self._keys(stack)))
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(CannotWrite):  # said before, or nothing was lost
            self.sync()
        self._stack.close()

    @property
    def found(self) -> int:
        """Rows that are written."""
        return self._answers.rows + self._errors.rows

    @property
    def answered(self) -> int:
        """Those of them that have an answer."""
        return self._answers.rows

    def has(self, row: Row | BadRow) -> bool:
        """Whether an earlier run has written the row."""
        answered = isinstance(row, Row) and row.custom_id in self._answers.known
        return answered or str(row.number) in self._errors.known

    def write(self, row: Row | BadRow, answer: Answer | None) -> None:
        """answer: None for a row that was not asked. CannotWrite when the disk refuses it, Stopped when too many have
        failed."""
        if isinstance(row, Row) and answer is not None and answer.status < 400:
            self._answers.append(self._form.answered(row, answer))
        else:
            error = _error_of(row, answer)
            self._errors.append(self._form.failed(row, answer, error) | {"line": row.number})
            self.failures[error["code"]] += 1
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()
        count, most = self.failures.total(), self._max_errors
        if most is not None and count > most:
            raise Stopped(f"{count} rows failed, more than --max-errors {most}; the same command continues")

    def sync(self) -> None:
        """Returns when all rows so far are on the disk."""
        self._answers.sync()
        self._errors.sync()
        self._synced = time.monotonic()

    def _keys(self, stack: ExitStack) -> DiskSet:
        keys = DiskSet()
        stack.callback(keys.close)
        return keys


def _error_of(row: Row | BadRow, answer: Answer | None) -> dict[str, str]:
    if isinstance(row, BadRow):
        return {"code": row.code, "message": row.message}
    assert answer is not None
    error = answer.body["error"]
    return {"code": error["code"], "message": error["message"]}


def _manifest(path: Path) -> Path:
    return path.with_name(f"{path.stem}.manifest.json")


def check_job(path: Path, job: Mapping[str, Any], rows: int) -> None:
    """Notes in a file beside the output what the job is. UserError when the output is another's, names what differs."""
    manifest = _manifest(path)
    stated = json.loads(json.dumps(job, default=str))
    try:
        before = json.loads(manifest.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if rows:
            message = f"{path} has rows and no {manifest.name} beside it; name another file"
            raise UserError(message, code="another_job") from None
        _write_whole(manifest, json.dumps(stated, indent=1) + "\n")
        return
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {manifest}: {error}; name another output", code="another_job") from error
    for name in dict.fromkeys((*before, *stated)):
        if before.get(name) != stated.get(name):
            then, now = (json.dumps(one.get(name)) for one in (before, stated))
            message = f"{path} belongs to another job: {name} was {then}, is {now}; name another file, or remove it"
            raise UserError(message, code="another_job", param=name)


def _write_whole(path: Path, text: str) -> None:
    """An interruption leaves no file, or the whole one."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {error.strerror}") from error
