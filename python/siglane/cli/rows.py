"""JSON Lines that a run writes as it goes and the next run continues."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from siglane.cli.common import writing
from siglane.errors import SiglaneError, UserError


class RowFile:
    """One JSON object per line, told apart by `key`. A half-written last line is cut off when the file is opened.

    Whenever the run stops, by a signal or a full disk, the file holds whole rows only. known: the keys of the rows
    that are there. UserError when the file is not such a file, or another run is writing it.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self._key = path, key
        with writing(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.known, self._end = self._read()
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
        """SiglaneError when it cannot be written; the rows before it stay valid."""
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        try:
            written = os.write(self._descriptor, line)
            if written < len(line):  # the disk took a part; writing the rest says why
                os.write(self._descriptor, line[written:])
        except OSError as error:
            self._cut()
            reason = error.strerror or errno.errorcode.get(error.errno or 0, "unknown error")
            raise SiglaneError(
                f"cannot write {self.path}: {reason}; its rows so far are whole, the same command continues it"
            ) from error
        self._end += len(line)
        self.known.add(row[self._key])

    def close(self) -> None:
        os.close(self._descriptor)

    def _cut(self) -> None:
        with contextlib.suppress(OSError):  # a device or a pipe has no length
            os.ftruncate(self._descriptor, self._end)

    def _read(self) -> tuple[set[str], int]:
        """The keys of all rows, and where the last whole row ends."""
        known: set[str] = set()
        end, bad = 0, 0
        if not self.path.is_file():
            return known, end
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if bad:
                    raise UserError(
                        f"{self.path}, line {bad} is not a row with {self._key!r}; name another file",
                        code="cannot_write",
                    )
                found = self._key_of(line)
                if found is None:
                    bad = number
                    continue
                known.add(found)
                end += len(line)
        return known, end

    def _key_of(self, line: bytes) -> str | None:
        if not line.endswith(b"\n"):
            return None
        try:
            row = json.loads(line)
        except ValueError:
            return None
        found = row.get(self._key) if isinstance(row, dict) else None
        return found if isinstance(found, str) else None
