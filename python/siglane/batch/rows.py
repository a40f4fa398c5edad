"""JSON Lines that a run writes as it goes and the next run continues."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from siglane.errors import SiglaneError, UserError


class CannotWrite(SiglaneError):
    """The disk refuses a row. What stands before it is whole."""


class Keys(Protocol):
    """A set of texts, in memory or elsewhere."""

    def add(self, key: str, /) -> object: ...
    def __contains__(self, key: object, /) -> bool: ...


class RowFile:
    """One JSON object per line, told apart by `key`: a text or a number. A half-written last line is cut off when the
    file is opened.

    Whenever the run stops, by a signal or a full disk, the file holds whole rows only. known: gets the keys of the
    rows that are there; owned: whether an earlier run has written it, else nothing is cut off. UserError when the file
    is not such a file, or another run is writing it.
    """

    def __init__(self, path: Path, key: str, known: Keys | None = None, *, owned: bool = True) -> None:
        self.path, self._key, self.known = path, key, set[str]() if known is None else known
        self._owned = owned
        self.rows = 0
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}", code="cannot_write") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._end = self._read()
            self._cut()
        except BlockingIOError as error:
            self.close()
            raise UserError(f"{path} is being written by another run", code="cannot_write") from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def append(self, row: Mapping[str, Any]) -> None:
        """CannotWrite when the disk refuses it; the rows before it stay valid."""
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        try:
            written = os.write(self._descriptor, line)
            if written < len(line):  # the disk took a part; writing the rest says why
                os.write(self._descriptor, line[written:])
        except OSError as error:
            self._cut()
            reason = error.strerror or errno.errorcode.get(error.errno or 0, "unknown error")
            raise CannotWrite(
                f"cannot write {self.path}: {reason}; its rows so far are whole, the same command continues it"
            ) from error
        self._end += len(line)
        self.rows += 1
        self.known.add(str(row[self._key]))

    def sync(self) -> None:
        """Returns when the rows so far are on the disk. CannotWrite when it reports a failure."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a device or a pipe has no disk
                raise CannotWrite(f"cannot write {self.path}: {error.strerror}; the same command continues") from error

    def close(self) -> None:
        os.close(self._descriptor)

    def _cut(self) -> None:
        with contextlib.suppress(OSError):  # a device or a pipe has no length
            os.ftruncate(self._descriptor, self._end)

    def _read(self) -> int:
        """Notes the keys of all rows; where the last whole row ends."""
        end, bad = 0, 0
        if not self.path.is_file():
            return end
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                found = self._key_of(line)
                whole = not self._owned or (number == 1 and line.endswith(b"\n"))  # a first one is nobody's half row
                if bad or (found is None and whole):
                    raise UserError(
                        f"{self.path}, line {bad or number} is not a row with {self._key!r}; name another file",
                        code="cannot_write",
                    )
                if found is None:
                    bad = number
                    continue
                self.known.add(found)
                self.rows += 1
                end += len(line)
        return end

    def _key_of(self, line: bytes) -> str | None:
        if not line.endswith(b"\n"):
            return None
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return None
        found = row.get(self._key) if isinstance(row, dict) else None
        return str(found) if isinstance(found, str | int) else None
