"""Settings as frozen dataclasses: what a field is called on the command line and in the environment, how it is read.

A field `max_tokens: int | None = option(None, "...")` is `--max-tokens N` and `SIGLANE_MAX_TOKENS`.
Types: bool, int, float, str, Path, Literal, `X | None`, and tuples of them for settings that take several values.

Settings of a deployment (engine, server, media, sampling) have one variable for all commands. What only one command has
is a `CommandOptions`, and its variables carry the command's name: `SIGLANE_TAG_LABELS`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from siglane.errors import ConfigError, UserError

Config = TypeVar("Config")
T = TypeVar("T")

PREFIX = "SIGLANE_"
WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def option(
    default: T,
    help: str,
    *,
    short: str | None = None,
    alias: str | None = None,
    bare: str | None = None,
    repr: bool = True,
) -> T:
    """A dataclass's field that is an option; `described` has the others."""
    described_as = described(help, short=short, alias=alias, bare=bare)
    return dataclasses.field(default=default, metadata=described_as, repr=repr)


def described(
    help: str, *, short: str | None = None, alias: str | None = None, bare: str | None = None
) -> dict[str, str | None]:
    """Metadata of a field that is an option. short: a one-letter flag; alias: an older name that is still read; bare:
    the value of a text whose flag is given without one."""
    return {"help": help, "short": short, "alias": alias, "bare": bare}


class CommandOptions:
    """Base of the options that a command has for itself."""

    __slots__ = ()
    COMMAND: ClassVar[str]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Option:
    """One field as a setting. parse: text of one value -> value, ValueError when it is not one."""

    name: str
    variables: tuple[str, ...]  # the first is its own, any other an alias
    help: str
    default: Any  # dataclasses.MISSING when the option is required
    kind: type
    choices: tuple[str, ...]
    many: bool
    short: str | None
    alias: str | None
    bare: str | None
    parse: Callable[[str], Any]

    @property
    def flags(self) -> tuple[str, ...]:
        """The flag, then its alias."""
        return tuple("--" + name.replace("_", "-") for name in (self.name, self.alias) if name)

    @property
    def variable(self) -> str:
        return self.variables[0]

    @property
    def set_variable(self) -> str | None:
        """The one of its variables that is set, and not empty."""
        return next((variable for variable in self.variables if os.environ.get(variable)), None)

    def from_environment(self) -> Any:
        """The variable's value; MISSING when none is set. UserError names the variable."""
        variable = self.set_variable
        return dataclasses.MISSING if variable is None else self._parsed(os.environ[variable], variable)

    def _parsed(self, text: str, variable: str) -> Any:
        try:
            if self.kind is bool:
                return _parse_switch(text)
            return tuple(self.parse(part) for part in _list_of(text)) if self.many else self.parse(text)
        except ValueError as error:
            raise UserError(
                f"environment variable {variable}={text!r} {error}", code="bad_environment", param=variable
            ) from error


def options_of(config: type[Any], help: Mapping[str, str] | None = None) -> list[Option]:
    """The options of a dataclass, in its order; `help` adds texts for fields without metadata."""
    hints = typing.get_type_hints(config)
    texts = help or {}
    scope = f"{config.COMMAND.upper()}_" if issubclass(config, CommandOptions) else ""
    return [
        _option(field, hints[field.name], field.metadata.get("help", texts.get(field.name, "")), PREFIX + scope)
        for field in dataclasses.fields(config)
    ]


def read_environment(config: type[Config], **given: Any) -> Config:
    """Builds `config` from `given`, then the environment, then its defaults. UserError as `resolve`."""
    return resolve(config, given)


def _missing_variable(option: Option) -> UserError:
    return UserError(f"environment variable {option.variable} is missing", code="bad_environment")


def resolve(
    config: type[Config],
    given: Mapping[str, Any],
    stated: Mapping[str, Any] | None = None,
    missing: Callable[[Option], UserError] = _missing_variable,
    file: Path | None = None,
) -> Config:
    """Builds `config` from `given`, then the environment, then what a `file` has `stated`, then its defaults.

    UserError names the variable or the key whose value cannot be used; `missing` makes that of a required option
    without a value.
    """
    values, sources = dict(given), {}
    for option in options_of(config):
        name = option.name
        if name in given:
            continue
        if (found := option.from_environment()) is not dataclasses.MISSING:
            values[name], sources[name] = found, str(option.set_variable)
        elif stated and name in stated:
            values[name], sources[name] = stated[name], key_of(name, file)
        elif option.default is dataclasses.MISSING:
            raise missing(option)
    try:
        return config(**values)
    except UserError as error:
        words = re.findall(r"\w+", error.message)
        guilty = [source for name, source in sources.items() if name in words]
        if not guilty:
            raise
        raise UserError(f"{error.message} (from {', '.join(guilty)})", code=error.code, param=guilty[0]) from error


def key_of(name: str, file: Path | None) -> str:
    """What messages call a value of a file."""
    return f"the key {name} of {file}" if file is not None else f"the key {name} of the settings"


def at_least(name: str, value: float, least: int) -> None:
    """ConfigError when a setting is less."""
    if not value >= least:
        raise ConfigError(f"{name} must be at least {least}, got {value}")


def one_of(name: str, value: str, known: Collection[str]) -> None:
    """ConfigError when a setting is another."""
    if value not in known:
        raise ConfigError(f"{name} {value!r} is not known; use {', '.join(known)}")


def above_zero(name: str, value: float) -> None:
    """ConfigError when a setting is not."""
    if not value > 0:
        raise ConfigError(f"{name} must be above 0, got {value}")


def _option(field: dataclasses.Field[Any], hint: Any, help: str, prefix: str) -> Option:
    hint = _without_none(hint)
    many = typing.get_origin(hint) is tuple
    element = typing.get_args(hint)[0] if many else hint
    choices = typing.get_args(element) if typing.get_origin(element) is Literal else ()
    kind = str if choices else element if isinstance(element, type) else tuple
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    alias = field.metadata.get("alias")
    variables = tuple(prefix + name.upper() for name in (field.name, alias) if name)
    parse = _parser_of(field.name, element, choices)
    short, bare = field.metadata.get("short"), field.metadata.get("bare")
    return Option(field.name, variables, help, default, kind, choices, many, short, alias, bare, parse)


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    return hint


def _parser_of(name: str, element: Any, choices: tuple[str, ...]) -> Callable[[str], Any]:
    if choices:
        return lambda text: _parse_choice(text, choices)
    if typing.get_origin(element) is tuple:
        fields = [_parser_of(name, part, ()) for part in typing.get_args(element)]
        return lambda text: _parse_fields(text, fields)
    if element is int:
        return _parse_bytes if name.endswith("_bytes") else _parse_int
    parsers: dict[Any, Callable[[str], Any]] = {float: _parse_float, bool: _parse_switch, Path: Path}
    return parsers.get(element, str)


def _parse_choice(text: str, choices: tuple[str, ...]) -> str:
    if text not in choices:
        raise ValueError(f"is not one of {', '.join(choices)}")
    return text


def _parse_fields(text: str, parsers: list[Callable[[str], Any]]) -> tuple[Any, ...]:
    parts = text.split(":")
    if len(parts) != len(parsers):
        raise ValueError(f"is not {len(parsers)} values joined by ':'")
    return tuple(parse(part) for parse, part in zip(parsers, parts, strict=True))


def _parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("is not a whole number") from None


def _parse_bytes(text: str) -> int:
    unit = UNITS.get(text[-1:].upper())
    return _parse_int(text[:-1]) * unit if unit else _parse_int(text)


def _parse_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("is not a number") from None


def _parse_switch(text: str) -> bool:
    try:
        return WORDS[text.lower()]
    except KeyError:
        raise ValueError("is not a switch; use 1 or 0") from None


def _list_of(text: str) -> list[str]:
    """Values of a variable that holds several: a JSON list of strings, or text between commas."""
    if not text.startswith("["):
        return text.split(",")
    found = json.loads(text)
    if not isinstance(found, list) or not all(isinstance(part, str) for part in found):
        raise ValueError("is not a JSON list of strings")
    return found
