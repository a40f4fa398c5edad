"""What docs/add_a_model.md says a family costs is what it costs: the files that know its name, and their lines."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

import siglane
from siglane.families.registry import CHAT_FAMILIES, TOWER_FAMILIES

PACKAGE = Path(siglane.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "add_a_model.md"
ROW = re.compile(r"^\| `(\w+)` \| (.+) \| (\d+) \| (\d+) \|$", re.MULTILINE)
REGISTRIES = {"families/registry.py", "verify/references/registry.py"}
TOLERANCE = 0.1
# of one model, in all its layouts: lines of facts, layout rule, prompt and plan, the reference not counted
MOST = {
    ("idefics3",): 220, ("llava_qwen",): 220, ("video_llama_3", "videollama3_qwen2"): 220, ("bee",): 60, ("r_4b",): 60,
    ("ovis2_6",): 40,
}  # fmt: skip
MOST_OF_EXPERTS = 140  # of the sparse MLP in `lm/`, with as many bits as one likes

# family -> files, lines, lines without the reference
ROWS = {
    name: (re.findall(r"`([\w/]+\.py)`", files), int(lines), int(own))
    for name, files, lines, own in ROW.findall(PAGE.read_text(encoding="utf-8"))
}
FAMILIES = [family.name for family in (*CHAT_FAMILIES, *TOWER_FAMILIES)]


def knows(file: Path, name: str) -> bool:
    """Whether it is called after the family, imports its module or holds its name as a string."""
    if file.stem == name:
        return True
    source = file.read_text(encoding="utf-8")
    if name not in source:
        return False
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.ImportFrom(module=str(module), names=names):
                if name in module.split(".") or name in {alias.name for alias in names}:
                    return True
            case ast.Constant(value=str(text)) if text == name:
                return True
    return False


def test_every_family_has_a_row() -> None:
    assert set(ROWS) == set(FAMILIES)


@pytest.mark.parametrize("name", [family.name for family in CHAT_FAMILIES])
def test_only_its_own_files_and_the_registries_know_a_family(name: str) -> None:
    """Its own, and those of relatives that derive from it."""
    files = {file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py") if knows(file, name)}
    listed = {file for file in ROWS[name][0] if not file.startswith("tiling/")}
    relatives = {file for other, row in ROWS.items() for file in row[0] if other != name} - listed
    assert files - {f"tiling/{name}.py"} - relatives == listed | REGISTRIES


def users(file: str) -> set[str]:
    """The families whose own files, or rules, import `file` of the package."""
    imported = re.compile(rf"^from siglane\.{file.removesuffix('.py').replace('/', '.')} import", re.MULTILINE)
    rules = {row: name for name in FAMILIES for row in ROWS[name][0] if not row.startswith("verify/")}
    return {name for row, name in rules.items() if imported.search((PACKAGE / row).read_text(encoding="utf-8"))}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layout_rule_of_its_own_is_nobody_elses(name: str) -> None:
    """But those of families that derive from it."""
    derived = {other for other in users(f"families/{name}.py") if other != name}
    for file in (file for file in ROWS[name][0] if file.startswith("tiling/")):
        assert users(file) - derived == {name}


@pytest.mark.parametrize("room", ["families", "tiling"])
def test_what_families_share_is_shared(room: str) -> None:
    """A file that one family alone imports is that family's, and counted as such."""
    own = {file for row in ROWS.values() for file in row[0]}
    others = {file.relative_to(PACKAGE).as_posix() for file in (PACKAGE / room).glob("*.py")} - own
    assert [file for file in sorted(others) if len(users(file)) == 1] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_the_lines_are_counted(name: str) -> None:
    files, whole, own = ROWS[name]
    without = [file for file in files if not file.startswith("verify/")]
    for stated, counted in ((whole, lines_of(files)), (own, lines_of(without))):
        assert abs(counted - stated) <= TOLERANCE * stated, f"{name} has {counted} lines, the page says {stated}"


@pytest.mark.parametrize("names", MOST, ids=" and ".join)
def test_a_family_is_short(names: tuple[str, ...]) -> None:
    assert lines_of(file for name in names for file in ROWS[name][0] if not file.startswith("verify/")) <= MOST[names]


def test_a_sparse_mlp_is_short() -> None:
    """All that knows it in `lm/`, but for what builds, turns and quantises whole decoders."""
    known = [file.name for file in sorted((PACKAGE / "lm").glob("*.py")) if "SparseMLP" in file.read_text("utf-8")]
    assert known == ["experts.py", "quantise.py", "qwen.py"]
    assert lines_of(["lm/experts.py"]) <= MOST_OF_EXPERTS


def lines_of(files: Iterable[str]) -> int:
    return sum(len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) for file in files)
