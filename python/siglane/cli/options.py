"""Flags and environment variables, generated from frozen dataclasses: one field, one flag, one variable, one default.

A field `max_tokens: int | None = field(default=None, metadata={"help": "..."})` gives `--max-tokens N` and
`SIGLANE_MAX_TOKENS`. The flag wins over the variable, the variable over the default. Metadata: `help`, and `short`
for a one-letter flag. Types: bool, int, float, str, Path, Literal, `X | None`, and tuples of them for flags that take
several values.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from siglane.errors import UserError

Config = TypeVar("Config")

PREFIX = "SIGLANE_"
WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
METAVARS = {int: "N", float: "X", Path: "PATH"}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are `UserError`s, printed by `main` like every other error.

    Flags cannot be abbreviated: an abbreviation in a script breaks on the day a second flag begins alike.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs | {"allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help", code="bad_option")


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One field as the command line sees it. parse: text of one value -> value, ValueError when it is not one."""

    name: str
    help: str
    default: Any  # dataclasses.MISSING when the option is required
    kind: type
    choices: tuple[str, ...]
    many: bool
    short: str | None
    parse: Callable[[str], Any]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()

    def add_to(self, group: argparse._ArgumentGroup) -> None:
        names = [self.short, self.flag] if self.short else [self.flag]
        common: dict[str, Any] = {"dest": self.name, "default": argparse.SUPPRESS, "help": self._help()}
        if self.kind is bool:
            group.add_argument(*names, action=argparse.BooleanOptionalAction, **common)
            return
        if self.many:
            common |= {"action": "extend", "nargs": "+"}
        metavar = "{" + ",".join(self.choices) + "}" if self.choices else METAVARS.get(self.kind, "TEXT")
        group.add_argument(*names, type=self._parse_flag, metavar=metavar, **common)

    def from_environment(self) -> Any:
        """The variable's value; MISSING when it is not set or empty. UserError names the variable."""
        text = os.environ.get(self.variable, "")
        if not text:
            return dataclasses.MISSING
        try:
            if self.kind is bool:
                return _parse_switch(text)
            return tuple(self.parse(part) for part in _list_of(text)) if self.many else self.parse(text)
        except ValueError as error:
            raise UserError(
                f"environment variable {self.variable}={text!r} {error}", code="bad_environment", param=self.variable
            ) from error

    def _parse_flag(self, text: str) -> Any:
        try:
            return self.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} {error}") from error

    def _help(self) -> str:
        notes = [] if self.default is dataclasses.MISSING else [f"default: {self._shown_default()}"]
        return f"{self.help} [{', '.join([*notes, self.variable])}]".lstrip().replace("%", "%%")

    def _shown_default(self) -> str:
        match self.default:
            case None | ():
                return "none"
            case bool():
                return "on" if self.default else "off"
            case int() if self.name.endswith("_bytes") and self.default % UNITS["M"] == 0:
                return f"{self.default // UNITS['M']}M"
            case tuple():
                return ",".join(map(str, self.default))
            case _:
                return str(self.default)


def options_of(config: type[Any], help: Mapping[str, str] | None = None) -> list[Option]:
    """The options of a dataclass, in its order; `help` adds texts for fields without metadata."""
    hints = typing.get_type_hints(config)
    texts = help or {}
    return [
        _option(field, hints[field.name], field.metadata.get("help", texts.get(field.name, "")))
        for field in dataclasses.fields(config)
    ]


def add_options(
    parser: argparse.ArgumentParser,
    config: type[Any],
    title: str,
    *,
    only: Collection[str] | None = None,
    help: Mapping[str, str] | None = None,
) -> None:
    """Gives `parser` one flag for each field of `config`, or for those in `only`."""
    group = parser.add_argument_group(title)
    for option in options_of(config, help):
        if only is None or option.name in only:
            option.add_to(group)


def read_options(config: type[Config], arguments: argparse.Namespace) -> Config:
    """Builds `config` from flags, then the environment, then its defaults.

    UserError names a required flag that is absent, or a variable whose value cannot be used.
    """
    options = options_of(config)
    values = {
        option.name: found for option in options if (found := _value(option, arguments)) is not dataclasses.MISSING
    }
    try:
        return config(**values)
    except UserError as error:
        guilty = [option.variable for option in options if option.name in error.message and _is_set(option, arguments)]
        if not guilty:
            raise
        raise UserError(f"{error.message} (from {', '.join(guilty)})", code=error.code, param=guilty[0]) from error


def known_variables(configs: Iterable[type[Any]]) -> set[str]:
    """Every environment variable these dataclasses read."""
    return {option.variable for config in configs for option in options_of(config)}


def _value(option: Option, arguments: argparse.Namespace) -> Any:
    """What the flag says, else what the environment says, else MISSING."""
    found = getattr(arguments, option.name, dataclasses.MISSING)
    if found is dataclasses.MISSING:
        found = option.from_environment()
    if found is dataclasses.MISSING and option.default is dataclasses.MISSING:
        raise UserError(f"{option.flag} is missing; give it, or set {option.variable}", code="bad_option")
    return tuple(found) if option.many and found is not dataclasses.MISSING else found


def _is_set(option: Option, arguments: argparse.Namespace) -> bool:
    """Whether the value came from the environment."""
    return not hasattr(arguments, option.name) and bool(os.environ.get(option.variable))


def _option(field: dataclasses.Field[Any], hint: Any, help: str) -> Option:
    hint = _without_none(hint)
    many = typing.get_origin(hint) is tuple
    element = typing.get_args(hint)[0] if many else hint
    choices = typing.get_args(element) if typing.get_origin(element) is Literal else ()
    kind = str if choices else element if isinstance(element, type) else tuple
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    parse = _parser_of(field.name, element, choices)
    return Option(field.name, help, default, kind, choices, many, field.metadata.get("short"), parse)


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
