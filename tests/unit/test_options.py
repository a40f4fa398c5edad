"""Flags and environment variables come from dataclasses: precedence, types, complaints."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from siglane.cli.options import Parser, add_options, known_variables, options_of, read_options
from siglane.engine.config import EngineConfig
from siglane.errors import UserError
from siglane.server.config import ServerConfig
from siglane.types import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Example:
    name: str = field(metadata={"help": "100 % needed", "short": "-n"})
    count: int = 3
    share: float | None = None
    fast: bool = True
    colour: Literal["red", "blue"] = "red"
    folder: Path = Path("here")
    words: tuple[str, ...] = ()
    pairs: tuple[tuple[int, float], ...] = ()
    cache_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        if self.count < 0:
            raise UserError(f"count must not be negative, got {self.count}", code="bad")


def read(*words: str, config: type[Any] = Example) -> Any:
    parser = Parser(prog="siglane test")
    add_options(parser, config, "example")
    return read_options(config, parser.parse_args(words))


def test_defaults_are_the_dataclass_s() -> None:
    assert read("--name", "x") == Example(name="x")


def test_every_type_is_read_from_flags() -> None:
    words = "-n x --count 7 --share 0.5 --no-fast --colour blue --folder /tmp --words a b --words c --pairs 3:1.5 4:-2"
    found = read(*words.split(), "--cache-bytes", "2G")
    assert found == Example(
        name="x",
        count=7,
        share=0.5,
        fast=False,
        colour="blue",
        folder=Path("/tmp"),
        words=("a", "b", "c"),
        pairs=((3, 1.5), (4, -2.0)),
        cache_bytes=2 << 30,
    )


def test_every_type_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "NAME": "x",
        "COUNT": "7",
        "SHARE": "0.5",
        "FAST": "off",
        "COLOUR": "blue",
        "FOLDER": "/tmp",
        "WORDS": '["a,b", "c"]',
        "PAIRS": "3:1.5,4:-2",
        "CACHE_BYTES": "512k",
    }
    for name, value in values.items():
        monkeypatch.setenv(f"SIGLANE_{name}", value)
    assert read() == Example(
        name="x",
        count=7,
        share=0.5,
        fast=False,
        colour="blue",
        folder=Path("/tmp"),
        words=("a,b", "c"),
        pairs=((3, 1.5), (4, -2.0)),
        cache_bytes=512 << 10,
    )


def test_flag_wins_over_variable_and_variable_over_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read("-n", "x").count == 3
    monkeypatch.setenv("SIGLANE_COUNT", "4")
    assert read("-n", "x").count == 4
    assert read("-n", "x", "--count", "5").count == 5
    monkeypatch.setenv("SIGLANE_FAST", "0")
    assert read("-n", "x", "--fast").fast is True
    monkeypatch.setenv("SIGLANE_COUNT", "")
    assert read("-n", "x").count == 3


@pytest.mark.parametrize(
    ("variable", "value", "complaint"),
    [
        ("COUNT", "many", "SIGLANE_COUNT='many' is not a whole number"),
        ("SHARE", "half", "SIGLANE_SHARE='half' is not a number"),
        ("FAST", "maybe", "SIGLANE_FAST='maybe' is not a switch; use 1 or 0"),
        ("COLOUR", "green", "SIGLANE_COLOUR='green' is not one of red, blue"),
        ("PAIRS", "3", "SIGLANE_PAIRS='3' is not 2 values joined by ':'"),
        ("WORDS", "[1]", "SIGLANE_WORDS='[1]' is not a JSON list of strings"),
        ("WORDS", '["a"', "SIGLANE_WORDS="),
        ("COUNT", "-1", "count must not be negative, got -1 (from SIGLANE_COUNT)"),
    ],
)
def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, complaint: str) -> None:
    monkeypatch.setenv(f"SIGLANE_{variable}", value)
    with pytest.raises(UserError) as caught:
        read("-n", "x")
    assert complaint in caught.value.message
    assert caught.value.param == f"SIGLANE_{variable}"


def test_a_bad_flag_is_not_blamed_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGLANE_SHARE", "0.5")
    with pytest.raises(UserError) as caught:
        read("-n", "x", "--count", "-1")
    assert caught.value.message == "count must not be negative, got -1"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--count many", "argument --count: 'many' is not a whole number"),
        ("--colour green", "argument --colour: 'green' is not one of red, blue"),
        ("--cou 4", "unrecognized arguments: --cou 4"),
        ("--count", "argument --count: expected one argument"),
    ],
)
def test_a_bad_flag_is_named(words: str, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        read("-n", "x", *words.split())
    assert caught.value.message == f"{complaint}; see siglane test --help"


def test_a_required_option_names_its_flag_and_variable() -> None:
    with pytest.raises(UserError, match=r"--name is missing; give it, or set SIGLANE_NAME"):
        read()


def test_help_shows_default_and_variable() -> None:
    parser = Parser(prog="siglane test")
    add_options(parser, Example, "example")
    text = " ".join(parser.format_help().split())
    assert "100 % needed [SIGLANE_NAME]" in text
    assert "[default: 3, SIGLANE_COUNT]" in text
    assert "[default: on, SIGLANE_FAST]" in text
    assert "[default: 256M, SIGLANE_CACHE_BYTES]" in text


@pytest.mark.parametrize("config", [EngineConfig, ServerConfig, SamplingParams])
def test_the_real_configurations_have_flags_for_every_field(config: type[Any]) -> None:
    assert read(config=config) == config()
    assert all(option.help for option in options_of(config) if config is not SamplingParams)
    assert len(known_variables([config])) == len(options_of(config))
