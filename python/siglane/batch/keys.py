"""Texts on the disk, so that memory stays flat however many rows a file has."""

from __future__ import annotations

import sqlite3
from hashlib import blake2b


class DiskMap:
    """text -> whole number, by the text's digest (16 bytes, in a file without a name). Not for several threads."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)  # temporary: it goes with the connection
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("CREATE TABLE keys (digest BLOB PRIMARY KEY, value INTEGER) WITHOUT ROWID")

    def put(self, key: str, value: int) -> bool:
        """Whether the key is new; else its value stays."""
        return self._database.execute("INSERT OR IGNORE INTO keys VALUES (?, ?)", (_digest(key), value)).rowcount > 0

    def get(self, key: str) -> int | None:
        found = self._database.execute("SELECT value FROM keys WHERE digest = ?", (_digest(key),)).fetchone()
        return None if found is None else int(found[0])

    def close(self) -> None:
        self._database.close()


class DiskSet(DiskMap):
    """A set of texts."""

    def add(self, key: str) -> bool:
        """Whether it was new."""
        return self.put(key, 0)

    def __contains__(self, key: object) -> bool:
        return self.get(str(key)) is not None


def _digest(key: str) -> bytes:
    return blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
