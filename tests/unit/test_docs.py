"""The documentation is executed: names it points at exist, commands it shows run."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "siglane"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
POINTER = re.compile(r"`([\w/]+\.py): (\w+)`")
BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)\)")


def pointers() -> list[tuple[str, str, str]]:
    return [(page.name, *found) for page in PAGES for found in POINTER.findall(page.read_text())]


def commands() -> list[tuple[str, str]]:
    """Every line of a bash block that is not a comment; a trailing backslash joins lines."""
    found = []
    for page in PAGES:
        for block in BLOCK.findall(page.read_text()):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.name, line) for line in lines if line.strip() and not line.startswith("#")]
    return found


@cache
def defined(file: str) -> set[str]:
    """Names of its functions and classes. Many a file is pointed at ten times."""
    tree = ast.parse(((ROOT if file.startswith("recipes/") else PACKAGE) / file).read_text())
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


@pytest.mark.parametrize(("page", "file", "name"), pointers())
def test_every_name_that_the_docs_point_at_is_defined_there(page: str, file: str, name: str) -> None:
    assert name in defined(file), f"{page} points at {file}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_shows_commands() -> None:
    assert any(page == "README.md" and line.startswith("siglane ") for page, line in commands())


def test_documented_make_targets_exist() -> None:
    """Which of them do not, make says itself; each is wanted once by one make, which looks for a Python first."""
    lines = [shlex.split(line, comments=True) for _, line in commands() if line.startswith("make ")]
    words = {word for line in lines for word in line[1:]}
    assert "demo" in words
    dry = subprocess.run(["make", "-n", "-k", *sorted(words)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert dry.returncode == 0, dry.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("page", "line"), [c for c in commands() if c[1].startswith("siglane ")])
def test_documented_siglane_commands_run(page: str, line: str, tmp_path: Path) -> None:
    words = shlex.split(line, comments=True)[1:]
    if words[0] == "serve":
        pytest.skip("servers are started by tests/server; `make demo` runs the documented request")
    if "--host" in words:
        pytest.skip("hosts are examined by tests/hosts, where they are installed")
    for flag in ("-o", "--out", "--report"):
        if flag in words:
            place = words.index(flag) + 1
            words[place] = str(tmp_path / words[place])
    done = subprocess.run(
        [sys.executable, "-m", "siglane.cli.main", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{page}: {line}: {done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize(("page", "line"), [c for c in commands() if c[1].startswith("python ")])
def test_documented_python_commands_start(page: str, line: str) -> None:
    """They run for minutes; that their command line is understood is checked here."""
    words = shlex.split(line, comments=True)[1:]
    stop = 2 if words[0] == "-m" else 1
    done = subprocess.run(
        [sys.executable, *words[:stop], "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{page}: {line}: {done.stderr}"
    options = [word for word in words[stop:] if word.startswith("--")]
    assert all(option in done.stdout for option in options), f"{page}: {line}"


@pytest.mark.slow  # every example is read
def test_the_tables_of_model_facts_are_what_the_code_reads():
    done = subprocess.run(
        [sys.executable, "docs/make_model_facts.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
