"""The file of `--api-keys`: who may use a server, and how much of it.

One key a line (empty lines and those that begin with `#` are left out), or a `.toml` file with a table for each:

    [[keys]]
    key = "sk-2f..."
    name = "search-team"
    requests_per_minute = 600
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from siglane.config.reader import ConfigReader
from siglane.errors import ConfigError, UserError
from siglane.settings.options import at_least, options_of
from siglane.settings.tables import read_values

MAX_NAME_CHARACTERS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLimits:
    """What the requests of one key may take; None for no limit, or the server's."""

    requests_per_minute: int | None = None
    patches_per_minute: int | None = None
    concurrency: int | None = None
    max_stored_bytes: int | None = None
    max_queued_rows: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey(KeyLimits):
    """name: in logs and metrics; cache_salt: of its requests, None for one that nobody else has. No ConfigError shows a
    key."""

    key: str = field(repr=False)
    name: str | None = None
    cache_salt: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not is_key(self.key):
            raise ConfigError("a key must be printable ASCII and not empty")
        if self.name is not None and not (self.name.isprintable() and 0 < len(self.name) <= MAX_NAME_CHARACTERS):
            raise ConfigError(f"name must be printable and of 1 to {MAX_NAME_CHARACTERS} characters")
        if self.cache_salt is not None and not self.cache_salt.isprintable():
            raise ConfigError("cache_salt must be printable")
        for option in options_of(KeyLimits):
            value = getattr(self, option.name)
            if value is not None:
                at_least(option.name, value, 1)


def is_key(text: str) -> bool:
    return bool(text) and text.isascii() and text.isprintable()


def read_keys(file: Path) -> tuple[ApiKey, ...]:
    """UserError for a file that cannot be read, has no key, or one or a name twice. Neither it nor a key is shown: who
    takes the option for a key itself would find it in a log."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise _bad(f"the file of api_keys cannot be read: {error.strerror}; give a file with one key a line") from None
    except ValueError:
        raise _bad("the file of api_keys is not UTF-8") from None
    keys = _from_tables(text) if file.suffix == ".toml" else _from_lines(text)
    if not keys:
        raise _bad("the file of api_keys has no key: the server would be open to all")
    for what, values in (("key", [one.key for one in keys]), ("name", [one.name for one in keys if one.name])):
        if len(set(values)) < len(values):
            raise _bad(f"the file of api_keys has a {what} twice")
    return keys


def _from_lines(text: str) -> tuple[ApiKey, ...]:
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if key.startswith("["):
            raise _bad(f"line {number} of api_keys looks like TOML; let the file's name end with .toml")
        try:
            keys.append(ApiKey(key=key))
        except ConfigError as error:
            raise _bad(f"line {number} of api_keys: {error.message}") from None
    return tuple(keys)


def _from_tables(text: str) -> tuple[ApiKey, ...]:
    try:
        raw = tomllib.loads(text)
    except ValueError:  # its message may show a line
        raise _bad("the file of api_keys is not valid TOML") from None
    tables = raw.get("keys")
    if set(raw) != {"keys"} or not isinstance(tables, list):
        raise _bad("the file of api_keys must hold [[keys]] tables, and nothing else")
    return tuple(_from_table(table, f"api_keys, table {number}") for number, table in enumerate(tables, 1))


def _from_table(table: Any, where: str) -> ApiKey:
    try:
        reader = ConfigReader(table, where)
        if not isinstance(reader.raw.get("key"), str):
            raise ConfigError("key must be there, a text in quotes")
        return ApiKey(**read_values(reader, options_of(ApiKey)))
    except ConfigError as error:
        message = error.message.removeprefix(f"{where}: ")
        raise _bad(f"{where}: {message}") from None


def _bad(message: str) -> UserError:
    return UserError(message, code="bad_settings", param="api_keys")
