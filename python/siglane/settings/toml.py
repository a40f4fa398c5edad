"""Settings from a TOML file: one table holds values for the options of some dataclasses."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from siglane.config.reader import ConfigReader
from siglane.errors import ConfigError, UserError
from siglane.settings.options import Option


def read_table(file: Path, path: Sequence[str], options: Iterable[Option]) -> dict[str, Any]:
    """What the table `path` of a file states, by option name; nothing where the file has no such table.

    UserError for a file that cannot be read, an unknown key and a value of another type than its option's.
    """
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}", code="bad_settings") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise UserError(f"{file} is not valid TOML: {error}", code="bad_settings") from error
    reader = ConfigReader(raw, str(file))
    for name in path:
        if not reader.has(name):
            return {}
        reader = reader.section(name)
    known = {option.name: option for option in options}
    if unknown := sorted(reader.raw.keys() - known.keys()):
        raise ConfigError(f"{reader.name}: key {unknown[0]!r} is not known; siglane reads {', '.join(known)}")
    return {key: _value(reader, known[key]) for key in reader.raw}


def _value(reader: ConfigReader, option: Option) -> Any:
    """A value as TOML has it; a text where the option's own kind has no TOML type is read as the flag's would be."""
    found = reader.raw[option.name]
    if not option.many:
        return _single(reader, option, found)
    if not isinstance(found, list):
        raise ConfigError(f"{reader.name}: {option.name} must be a list, got {found!r}")
    return tuple(_single(reader, option, part) for part in found)


def _single(reader: ConfigReader, option: Option, found: Any) -> Any:
    one = ConfigReader({option.name: found}, reader.name)
    if option.choices:
        return one.choice(option.name, {choice: choice for choice in option.choices})
    plain: type[Any] = option.kind
    if plain in (bool, int, float, str) and not (isinstance(found, str) and option.name.endswith("_bytes")):
        return one.value(option.name, plain)
    try:
        return option.parse(one.value(option.name, str))
    except ValueError as error:
        raise ConfigError(f"{reader.name}: {option.name} {found!r} {error}") from error
