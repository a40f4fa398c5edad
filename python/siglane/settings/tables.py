"""Settings from a TOML or YAML file: one table holds values for the options of some dataclasses."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from siglane.config.reader import ConfigReader
from siglane.errors import ConfigError, UserError
from siglane.settings.options import Option

YAML = (".yaml", ".yml")


def read_table(file: Path, path: Sequence[str], options: Iterable[Option]) -> dict[str, Any]:
    """What the table `path` of a file states, by option name; nothing where the file has no such table.

    UserError for a file that cannot be read, an unknown key and a value of another type than its option's.
    """
    try:
        text = file.read_text(encoding="utf-8")
        raw = _from_yaml(text, file) if file.suffix in YAML else tomllib.loads(text)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}", code="bad_settings") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise UserError(f"{file} is not valid TOML: {error}", code="bad_settings") from error
    reader = ConfigReader(raw, str(file))
    for name in path:
        if not reader.has(name):
            return {}
        reader = reader.section(name)
    return read_values(reader, options)


def read_values(reader: ConfigReader, options: Iterable[Option]) -> dict[str, Any]:
    """What one table states, by option name. ConfigError for an unknown key and a value of another type."""
    known = {option.name: option for option in options}
    if unknown := sorted(map(str, reader.raw.keys() - known.keys())):
        raise ConfigError(f"{reader.name}: key {unknown[0]!r} is not known; siglane reads {', '.join(known)}")
    return {key: _value(reader, known[key]) for key in reader.raw}


def _from_yaml(text: str, file: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        message = f"{file} is YAML, which needs PyYAML (pip install pyyaml); TOML is read without it"
        raise UserError(message, code="missing_extra") from error

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value]
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise ValueError(f"the key {twice!r} stands twice")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        message = f"{file} is not valid YAML: {' '.join(str(error).split())}"
        raise UserError(message, code="bad_settings") from error


def _value(reader: ConfigReader, option: Option) -> Any:
    """A value as the file has it; a text where the option's own kind has no such type is read as the flag's would
    be."""
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
