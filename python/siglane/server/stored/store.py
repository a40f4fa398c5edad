"""What `/v1/files` and `/v1/batches` keep under `data_dir`, so that it outlives the server.

    siglane.sqlite3       what is known of files and batches
    files/file-...        what a file holds
    batches/batch_...     answers, errors and manifest of a batch under way (`batch/output.py`)

Every method may be called from any thread and blocks for the disk. An owner stands for a key (`clients.owner_of`);
for him, what belongs to another is not there.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from siglane.errors import EngineError, UserError
from siglane.server.stored.usage import usage_of

logger = logging.getLogger(__name__)

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
ACTIVE: tuple[Status, ...] = ("validating", "in_progress", "finalizing", "cancelling")
IS_ACTIVE = f"status IN ({', '.join('?' * len(ACTIVE))})"
Order = Literal["asc", "desc"]
VERSION = 1
FILE = "id, owner, purpose, filename, bytes, created_at, expires_at"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TABLES = """
CREATE TABLE IF NOT EXISTS files (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, purpose TEXT NOT NULL,
    filename TEXT NOT NULL, bytes INTEGER NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER
);
CREATE INDEX IF NOT EXISTS files_of ON files (owner, number);
CREATE TABLE IF NOT EXISTS batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, status TEXT NOT NULL,
    input_file_id TEXT NOT NULL, state TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS batches_of ON batches (owner, number);
CREATE INDEX IF NOT EXISTS batches_by ON batches (status, number);
"""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """filename: what its owner calls it, never a path here; times in seconds since 1970, None for never."""

    id: str
    owner: str
    purpose: str
    filename: str
    bytes: int
    created_at: int
    expires_at: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch as it stands. times: when it came to each status; total: its rows, 0 before they were counted; completed,
    failed: rows that are written; errors: OpenAI's, of a batch that cannot be run; model: the one that answers, by the
    name that it had at first; usage: OpenAI's, of one that has ended."""

    id: str
    owner: str
    input_file_id: str
    endpoint: str
    completion_window: str
    created_at: int
    expires_at: int
    file_seconds: float  # how long its outputs are kept, 0 for ever
    metadata: Mapping[str, str] | None = None
    status: Status = "validating"
    times: Mapping[str, int] = field(default_factory=dict)
    total: int = 0
    completed: int = 0
    failed: int = 0
    errors: Sequence[Mapping[str, Any]] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None
    model: str | None = None
    usage: Mapping[str, Any] | None = None

    @property
    def active(self) -> bool:
        return self.status in ACTIVE

    def turned(self, status: Status, **changes: Any) -> Batch:
        return replace(self, status=status, times={**self.times, status: int(time.time())}, **changes)


def new_id(kind: Literal["file-", "batch_"]) -> str:
    return kind + secrets.token_hex(12)


class Store:
    """One server's. UserError when the folder cannot be used, or another server does."""

    def __init__(self, folder: Path) -> None:
        self._files, self._work = folder / "files", folder / "batches"
        try:
            for needed in (self._files, self._work):
                needed.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._held = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._database = sqlite3.connect(
                folder / "siglane.sqlite3", isolation_level=None, check_same_thread=False, timeout=10
            )
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.executescript(TABLES)
            (found,) = self._database.execute("PRAGMA user_version").fetchone()
            self._database.execute(f"PRAGMA user_version = {VERSION}")
        except BlockingIOError as error:
            raise UserError(f"data_dir {folder} is another server's", code="data_dir_in_use") from error
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"data_dir {folder} cannot be used: {error}", code="bad_option") from error
        if found not in (0, VERSION):
            raise UserError(f"data_dir {folder} was written by another version of siglane", code="bad_option")
        self._lock = threading.RLock()
        self._sweep()

    def close(self) -> None:
        with self._lock:
            self._database.close()
            os.close(self._held)

    # --- files

    def part_path(self) -> Path:
        """Where a file that still comes may be written."""
        return self._files / f"{secrets.token_hex(12)}.part"

    def path_of(self, file_id: str) -> Path:
        return self._files / file_id

    def stored_bytes(self, owner: str) -> int:
        (found,) = self._one("SELECT coalesce(sum(bytes), 0) FROM files WHERE owner = ?", owner)
        return int(found)

    def add_file(self, file: StoredFile, part: Path, most_bytes: int) -> None:
        """Takes a file that is written whole. UserError (413) when its owner's would hold more than `most_bytes`."""
        with self._transaction():
            if self.stored_bytes(file.owner) + file.bytes > most_bytes:
                raise storage_full(most_bytes)
            self._insert(file)
            part.replace(self.path_of(file.id))

    def file(self, file_id: str, owner: str) -> StoredFile:
        """UserError (404) when there is none of this owner's."""
        row = self._one(f"SELECT {FILE} FROM files WHERE id = ? AND owner = ?", file_id, owner)
        if row is None:
            raise _missing("file", file_id)
        return StoredFile(*row)

    def files(
        self, owner: str, purpose: str | None, after: str | None, limit: int, order: Order
    ) -> tuple[list[StoredFile], bool]:
        """A page, and whether there are more."""
        where, values = ("AND purpose = ?", [purpose]) if purpose is not None else ("", [])
        rows, more = self._page("files", FILE, owner, where, values, after, limit, order)
        return [StoredFile(*row) for row in rows], more

    def delete_file(self, file_id: str, owner: str) -> None:
        """UserError when there is no such file (404), or a batch still reads it (409)."""
        with self._transaction():
            self.file(file_id, owner)
            if self._is_read(file_id):
                message = f"{file_id} is the input of a batch that has not ended; cancel that first"
                raise UserError(message, code="file_in_use", status=409)
            self._database.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self.path_of(file_id).unlink(missing_ok=True)

    def expire_files(self) -> None:
        """Deletes what is past its time, but for what a batch still reads."""
        now = int(time.time())
        for file_id, owner in self._all("SELECT id, owner FROM files WHERE expires_at <= ?", now):
            with suppress(UserError):
                self.delete_file(file_id, owner)

    # --- batches

    def add_batch(self, batch: Batch) -> None:
        """UserError (404) when its input is gone."""
        with self._transaction():
            self.file(batch.input_file_id, batch.owner)
            values = (batch.id, batch.owner, batch.status, batch.input_file_id, _state_of(batch))
            self._database.execute(
                "INSERT INTO batches (id, owner, status, input_file_id, state) VALUES (?, ?, ?, ?, ?)", values
            )

    def batch(self, batch_id: str, owner: str | None = None) -> Batch:
        """owner: None for any. UserError (404) when there is none."""
        row = self._one("SELECT state FROM batches WHERE id = ? AND owner = coalesce(?, owner)", batch_id, owner)
        if row is None:
            raise _missing("batch", batch_id)
        return Batch(**json.loads(row[0]))

    def batches(self, owner: str, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """A page, the newest first, and whether there are more."""
        rows, more = self._page("batches", "state", owner, "", [], after, limit, "desc")
        return [Batch(**json.loads(state)) for (state,) in rows], more

    def active_batches(self) -> list[Batch]:
        """Those that have not ended, the oldest first."""
        rows = self._all(f"SELECT state FROM batches WHERE {IS_ACTIVE} ORDER BY number", *ACTIVE)
        return [Batch(**json.loads(state)) for (state,) in rows]

    def update(self, batch_id: str, change: Callable[[Batch], Batch], owner: str | None = None) -> Batch:
        """What `change` makes of a batch, with nothing in between. UserError (404) when there is none."""
        with self._transaction():
            batch = change(self.batch(batch_id, owner))
            values = (batch.status, _state_of(batch), batch_id)
            self._database.execute("UPDATE batches SET status = ?, state = ? WHERE id = ?", values)
        return batch

    def output_path(self, batch_id: str) -> Path:
        """Of the answers of a batch under way; `batch/output.py` names the others after it."""
        return self._work / f"{batch_id}.jsonl"

    def finish(self, batch_id: str, status: Status, **changes: Any) -> Batch:
        """Ends a batch: what it has written becomes files of its owner's. Again after a kill, it goes on."""
        batch, output = self.batch(batch_id), self.output_path(batch_id)
        written = {"output": output, "error": output.with_name(f"{batch_id}.errors.jsonl")}
        changes["usage"] = usage_of(output if output.exists() else self.path_of(_output_id(batch_id, "output")))
        with self._transaction():
            found = {f"{kind}_file_id": self._take(batch, kind, path) for kind, path in written.items()}
            batch = self.update(batch_id, lambda one: one.turned(status, **found, **changes))
        for left in self._work.glob(f"{batch_id}.*"):
            left.unlink(missing_ok=True)
        return batch

    def _take(self, batch: Batch, kind: str, path: Path) -> str | None:
        file_id = _output_id(batch.id, kind)
        if path.exists() and path.stat().st_size:
            path.replace(self.path_of(file_id))
        if not self.path_of(file_id).exists():
            return None
        now = int(time.time())
        expires = now + int(batch.file_seconds) if batch.file_seconds else None
        size = self.path_of(file_id).stat().st_size
        name = f"{batch.id}_{kind}.jsonl"
        self._insert(StoredFile(file_id, batch.owner, "batch_output", name, size, now, expires))
        return file_id

    # --- SQLite

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, alone; inside another one, a part of it. EngineError when the disk refuses it."""
        with self._lock, refusing_disk():
            if self._database.in_transaction:
                yield
                return
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # a full disk has ended it already
                    self._database.execute("ROLLBACK")
                raise

    def _one(self, query: str, *values: Any) -> Any:
        with self._lock, refusing_disk():
            return self._database.execute(query, values).fetchone()

    def _all(self, query: str, *values: Any) -> list[Any]:
        with self._lock, refusing_disk():
            return self._database.execute(query, values).fetchall()

    def _page(
        self, table: str, columns: str, owner: str, where: str, values: list[Any], after: str | None, limit: int,
        order: Order,
    ) -> tuple[list[Any], bool]:  # fmt: skip
        if after is not None:
            number = self._one(f"SELECT number FROM {table} WHERE id = ? AND owner = ?", after, owner)
            if number is None:
                raise UserError(f"after names {after[:80]!r}, which is not there", code="invalid_value", param="after")
            where, values = f"{where} AND number {'>' if order == 'asc' else '<'} ?", [*values, *number]
        query = f"SELECT {columns} FROM {table} WHERE owner = ? {where} ORDER BY number {order} LIMIT ?"
        rows = self._all(query, owner, *values, limit + 1)
        return rows[:limit], len(rows) > limit

    def _insert(self, file: StoredFile) -> None:
        self._database.execute(
            f"INSERT OR IGNORE INTO files ({FILE}) VALUES (?, ?, ?, ?, ?, ?, ?)", tuple(asdict(file).values())
        )

    def _is_read(self, file_id: str) -> bool:
        query = f"SELECT 1 FROM batches WHERE input_file_id = ? AND {IS_ACTIVE}"
        return self._one(query, file_id, *ACTIVE) is not None

    def _sweep(self) -> None:
        """Deletes what a kill has left: parts, and files that nobody knows of."""
        known = {file_id for (file_id,) in self._all("SELECT id FROM files")}
        active = {one.id for one in self.active_batches()}
        known |= {_output_id(batch_id, kind) for batch_id in active for kind in ("output", "error")}
        for path in self._files.iterdir():
            if path.name not in known:
                path.unlink(missing_ok=True)
        for path in self._work.iterdir():
            if path.name.partition(".")[0] not in active:
                path.unlink(missing_ok=True)


@contextmanager
def refusing_disk() -> Iterator[None]:
    """EngineError (507) for what the disk refuses; the reason is in the log, the message names no path."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        full = isinstance(error, sqlite3.Error) or error.errno in FULL
        logger.error("the store of files and batches: %s", error)
        message = "the server's disk is full, or cannot be written; nothing was stored"
        raise EngineError(message, code="storage_full" if full else "storage_failed", status=507) from error


def storage_full(most_bytes: int) -> UserError:
    message = f"your files would hold more than {most_bytes} bytes; delete some"
    return UserError(message, code="storage_limit_exceeded", param="file", status=413)


def _output_id(batch_id: str, kind: str) -> str:
    """The same whenever a batch ends: a kill in the middle leaves no second file."""
    return "file-" + blake2b(f"{batch_id} {kind}".encode(), digest_size=12).hexdigest()


def _state_of(batch: Batch) -> str:
    return json.dumps(asdict(batch))


def _missing(kind: str, name: str) -> UserError:
    return UserError(f"there is no {kind} {name[:80]!r}", code=f"{kind}_not_found", status=404)
