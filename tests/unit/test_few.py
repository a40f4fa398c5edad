"""The mark `few` (tests/conftest.py): which of a test's cases `make test` runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
FILE = """
import pytest

@pytest.mark.few({names})
@pytest.mark.parametrize("case", ["one", "a-[x]", "a-y", "b.y", "bay"])
def test_marked(case): ...

@pytest.mark.parametrize("case", [1, 2])
def test_others(case): ...
"""
OTHERS = ["test_others[1]", "test_others[2]"]


def collected(folder: Path, names: tuple[str, ...], place: str = "") -> subprocess.CompletedProcess[str]:
    """What pytest finds with `-m "not slow"`, or says. place: behind the file's name, for some of its cases alone."""
    shutil.copy(CONFTEST, folder)
    (folder / "test_cases.py").write_text(FILE.format(names=", ".join(map(repr, names))))
    asked = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "not slow", f"test_cases.py{place}"]
    alone = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    return subprocess.run(asked, cwd=folder, env=alone, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("names", "run"),
    [
        (("one",), ["one"]),
        (("a-*",), ["a-[x]", "a-y"]),
        (("a-[x]", "*.y"), ["a-[x]", "b.y"]),  # nothing but the star is a pattern
    ],
)
def test_cases_that_are_named_run(tmp_path: Path, names: tuple[str, ...], run: list[str]) -> None:
    found = collected(tmp_path, names)
    tests = [line.removeprefix("test_cases.py::") for line in found.stdout.splitlines() if "::" in line]
    assert tests == [*(f"test_marked[{case}]" for case in run), *OTHERS]


def test_a_name_of_no_case_is_an_error(tmp_path: Path) -> None:
    """Not where a place was asked for, which has not all cases."""
    found = collected(tmp_path, ("one", "none"))
    assert found.returncode == pytest.ExitCode.USAGE_ERROR
    assert "few names cases that do not exist: [('test_cases.py::test_marked', 'none')]" in found.stderr
    assert collected(tmp_path, ("one", "none"), "::test_marked[one]").returncode == pytest.ExitCode.OK
