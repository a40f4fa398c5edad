"""A set of texts on the disk, so that memory stays flat however many rows a file has."""

from __future__ import annotations

import sqlite3
from hashlib import blake2b


class DiskSet:
    """Texts by their digest (16 bytes, in a file without a name). Not for several threads."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)  # temporary: it goes with the connection
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("CREATE TABLE keys (digest BLOB PRIMARY KEY) WITHOUT ROWID")

    def add(self, key: str) -> bool:
        """Whether it was new."""
        return self._database.execute("INSERT OR IGNORE INTO keys VALUES (?)", (_digest(key),)).rowcount > 0

    def __contains__(self, key: object) -> bool:
        found = self._database.execute("SELECT 1 FROM keys WHERE digest = ?", (_digest(str(key)),))
        return found.fetchone() is not None

    def close(self) -> None:
        self._database.close()


def _digest(key: str) -> bytes:
    return blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
