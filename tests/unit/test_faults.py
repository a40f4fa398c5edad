"""docs/faults.md says which tests stand for which fault: they exist, and the numbers in their names are rows of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"\| (\d+) \| .+ \| .+ \| (.*) \|")
WITHOUT_A_TEST = {68}  # a GPU's


def table() -> dict[int, list[tuple[str, str]]]:
    """(file, test) of each row."""
    lines = (ROOT / "docs/faults.md").read_text().splitlines()
    return {int(row[1]): re.findall(r"`(\w+): (\w+)`", row[2]) for row in map(ROW.fullmatch, lines) if row}


def test_every_row_is_there() -> None:
    assert list(table()) == list(range(1, 71))
    assert {number for number, tests in table().items() if not tests} == WITHOUT_A_TEST


@pytest.mark.parametrize("number", sorted({*table()} - WITHOUT_A_TEST))
def test_its_tests_are_there(number: int) -> None:
    for stem, name in table()[number]:
        (file,) = (ROOT / "tests").rglob(f"{stem}.py")
        assert re.search(rf"def {name}\(", file.read_text()), f"row {number}: {file.name} has no {name}"


def test_numbered_cases_are_those_of_their_row() -> None:
    source = (ROOT / "tests/server/test_bad_requests.py").read_text()
    cases = {"BAD_IMAGES": "image", "BAD_BODIES": "body", "RAW": "request"}
    for name, kind in cases.items():
        block = source[source.index(f"{name}: dict") :]
        numbers = {int(found) for found in re.findall(r'^    "(\d+) ', block[: block.index("\n}\n")], re.MULTILINE)}
        assert numbers
        for number in numbers:
            assert any(test.startswith("test_a_b") and kind in test for _, test in table()[number]), (number, kind)
