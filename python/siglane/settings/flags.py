"""Flags generated from `settings/options.py`: a flag wins over its variable, the variable over the default."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from siglane.errors import UserError
from siglane.settings.options import UNITS, Option, key_of, options_of, resolve
from siglane.settings.tables import read_table

Config = TypeVar("Config")

STATED, STATED_FILE = "stated_in_file", "file_that_states"
METAVARS = {int: "N", float: "X", Path: "PATH"}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are `UserError`s, printed by `main` like every other error.

    Flags cannot be abbreviated: an abbreviation in a script breaks on the day a second flag begins alike.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs | {"allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help", code="bad_option")


@dataclass(frozen=True, slots=True)
class OptionGroup:
    """The options that a command takes of one dataclass, under a title of its help.

    only: their names, None for all; help: texts for fields that have none of their own.
    """

    config: type[Any]
    title: str
    only: Collection[str] | None = None
    help: Mapping[str, str] = field(default_factory=dict)

    @property
    def options(self) -> list[Option]:
        return [one for one in options_of(self.config, self.help) if self.only is None or one.name in self.only]


def add_options(parser: argparse.ArgumentParser, groups: Iterable[OptionGroup]) -> None:
    """Gives `parser` one flag for each option."""
    for group in groups:
        under = parser.add_argument_group(group.title)
        for option in group.options:
            _add(under, option)


def read_options(config: type[Config], arguments: argparse.Namespace) -> Config:
    """Builds `config` from flags, then the environment, then the values of a file (`stated_in`), then its defaults.

    UserError names a required flag that is absent, or a variable whose value cannot be used.
    """
    given = vars(arguments)
    flags = {
        option.name: tuple(given[option.name]) if option.many else given[option.name]
        for option in options_of(config)
        if option.name in given
    }
    return resolve(config, flags, stated_in(arguments), _missing_flag, given.get(STATED_FILE))


def named(error: UserError, arguments: argparse.Namespace, groups: Iterable[OptionGroup]) -> UserError:
    """An error about an option's value (`threshold must be ...`), and the variable or key that the value came from."""
    about = error.message.partition(" ")[0]
    for option in (option for group in groups for option in group.options if option.name == about):
        if option.name in vars(arguments) or " (from " in error.message:
            break
        stated = option.name in stated_in(arguments)
        if source := option.set_variable or (key_of(about, vars(arguments).get(STATED_FILE)) if stated else None):
            return UserError(f"{error.message} (from {source})", code=error.code, param=source)
    return error


def _missing_flag(option: Option) -> UserError:
    return UserError(f"{option.flags[0]} is missing; give it, or set {option.variable}", code="bad_option")


def stated_in(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the file of `--config` states for this command, by option name."""
    found: dict[str, Any] = vars(arguments).get(STATED, {})
    return found


def read_file(arguments: argparse.Namespace, file: Path | None, groups: Iterable[OptionGroup]) -> None:
    """Keeps in `arguments` what a file states in the table of the command. UserError as `read_table`."""
    options = [option for group in groups for option in group.options]
    setattr(arguments, STATED, {} if file is None else read_table(file, [arguments.command], options))
    setattr(arguments, STATED_FILE, file)


def known_variables(configs: Iterable[type[Any]]) -> set[str]:
    """Every environment variable these dataclasses read."""
    return {variable for config in configs for option in options_of(config) for variable in option.variables}


def _add(group: argparse._ArgumentGroup, option: Option) -> None:
    names = [option.short, *option.flags] if option.short else option.flags
    common: dict[str, Any] = {"dest": option.name, "default": argparse.SUPPRESS, "help": _help(option)}
    if option.kind is bool:
        group.add_argument(*names, action=argparse.BooleanOptionalAction, **common)
        return
    if option.many:
        common |= {"action": "extend", "nargs": "+"}
    if option.bare is not None:
        common |= {"nargs": "?", "const": option.bare}
    metavar = "{" + ",".join(option.choices) + "}" if option.choices else METAVARS.get(option.kind, "TEXT")

    def parse(text: str) -> Any:
        try:
            return option.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} {error}") from error

    group.add_argument(*names, type=parse, metavar=metavar, **common)


def _help(option: Option) -> str:
    notes = [] if option.default is dataclasses.MISSING else [f"default: {_shown_default(option)}"]
    return f"{option.help} [{', '.join([*notes, option.variable])}]".lstrip().replace("%", "%%")


def _shown_default(option: Option) -> str:
    match option.default:
        case None | ():
            return "none"
        case bool():
            return "on" if option.default else "off"
        case int() if option.name.endswith("_bytes") and option.default % UNITS["M"] == 0:
            return f"{option.default // UNITS['M']}M"
        case tuple():
            return ",".join(map(str, option.default))
        case _:
            return str(option.default)
