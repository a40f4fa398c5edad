"""Citations lead somewhere: sections and traps of docs/formats.md, pages of docs/, files of this repository."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOTS = (ROOT, ROOT / "python", ROOT / "python" / "siglane")  # what a cited path may start from
SOURCES = sorted(
    file for folder in ("python", "recipes", "tests", "benchmark", "docs") for file in (ROOT / folder).rglob("*.py")
)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PATHS = {file.relative_to(root).as_posix() for root in ROOTS for file in SOURCES if file.is_relative_to(root)}
FOLDERS = {path.partition("/")[0] for path in PATHS if "/" in path}  # a path into any other is another project's

NUMBER = r"\d+(?:\.\d+)?"
FORMATS = re.compile(rf"\bformats\.md[\])]*\s+(trap|section)?s?\s*({NUMBER}(?:(?:,\s|\sand\s|-){NUMBER})*)")
PAGE = re.compile(r"\bdocs/\w+\.md\b")
FILE = re.compile(r"(?<![\w./-])(?:[\w-]+/)+\w+\.py\b")

_FACTS, _, _TRAPS = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8").partition("\n## Traps\n")
NUMBERS = {
    "trap": set(re.findall(r"^\| (\d+) \|", _TRAPS, re.MULTILINE)),
    "section": set(re.findall(rf"^##+ ({NUMBER})\.? ", _FACTS, re.MULTILINE)),
}


def told(source: str) -> str:
    """The comments and docstrings of a module."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT]
    statements = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr)]
    docstrings = [value.value for value in statements if isinstance(value, ast.Constant)]
    return "\n".join([*comments, *(text for text in docstrings if isinstance(text, str))])


def dead(text: str) -> list[str]:
    """The citations in `text` that lead nowhere."""
    found = []
    for kind, numbers in FORMATS.findall(text):
        kind = kind or "section"
        found += [f"formats.md {kind} {n}" for n in re.findall(NUMBER, numbers) if n not in NUMBERS[kind]]
    found += [page for page in PAGE.findall(text) if not (ROOT / page).exists()]
    found += [path for path in FILE.findall(text) if path.partition("/")[0] in FOLDERS and path not in PATHS]
    return found


def test_every_citation_leads_somewhere() -> None:
    texts = {file: file.read_text(encoding="utf-8") for file in [*SOURCES, *PAGES]}
    texts = {file: text for file, text in texts.items() if re.search(r"\.(md|py)\b", text)}  # parsing takes its time
    texts |= {file: told(text) for file, text in texts.items() if file.suffix == ".py"}
    found = [f"{file.relative_to(ROOT)}: {citation}" for file, text in texts.items() for citation in dead(text)]
    assert not found, "\n".join(found)
    assert sum(len(FORMATS.findall(text)) for text in texts.values()) > 40


@pytest.mark.parametrize(
    ("text", "citation"),
    [
        ("as trained (formats.md 99.1)", "formats.md section 99.1"),
        ("formats.md\nsections 1 and 99", "formats.md section 99"),
        ("formats.md 7.2, 7.99", "formats.md section 7.99"),
        ("formats.md 5.2-5.99", "formats.md section 5.99"),
        ("formats.md trap 999.", "formats.md trap 999"),
        ("see docs/absent.md", "docs/absent.md"),
        ("`families/absent.py: run`", "families/absent.py"),
        ("`python tests/unit/test_absent.py`", "tests/unit/test_absent.py"),
    ],
)
def test_a_dead_citation_is_found(text: str, citation: str) -> None:
    assert dead(text) == [citation]


@pytest.mark.parametrize(
    "text",
    [
        "formats.md 5.3; formats.md section 3. formats.md traps 1 and 12, in docs/formats.md",
        "tests/unit/test_citations.py, unlike llava/mm_utils.py and https://example.org/tests/absent.py",
    ],
)
def test_a_citation_that_resolves_is_not(text: str) -> None:
    assert dead(text) == []


def test_comments_and_docstrings_are_read_and_code_is_not() -> None:
    source = '"""One."""\nx = "not"  # two\ndef f():\n    """Three."""\nclass C:\n    a: int\n    """Four."""\n'
    assert told(source).split() == ["two", "One.", "Three.", "Four."]
