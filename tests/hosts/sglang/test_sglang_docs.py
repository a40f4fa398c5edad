"""The commands of docs/sglang.md are commands of this SGLang."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "sglang.md"
LINES = [line for line in PAGE.read_text().splitlines() if "sglang serve --" in line and not line.startswith(" ")]


def sglangs_parser() -> argparse.ArgumentParser:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(exit_on_error=False)
    ServerArgs.add_cli_args(parser)
    return parser


def test_there_are_some() -> None:
    assert len(LINES) >= 5


@pytest.mark.parametrize("line", LINES)
def test_sglang_has_every_option(line: str) -> None:
    words = shlex.split(line)
    options = sglangs_parser().parse_args(words[words.index("serve") + 1 :])
    assert options.model_path


def test_every_option_named_in_the_text_exists() -> None:
    known = {option for action in sglangs_parser()._actions for option in action.option_strings}
    inline = {word for part in PAGE.read_text().split("`")[1::2] for word in part.split() if word.startswith("--")}
    assert inline - {"--policy", "--host", "--teraflops", "--efficiency"} <= known
