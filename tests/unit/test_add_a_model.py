"""What docs/add_a_model.md says a family costs is what it costs: the files that know its name, and their lines."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import siglane
from siglane.families.registry import CHAT_FAMILIES, TOWER_FAMILIES

PACKAGE = Path(siglane.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "add_a_model.md"
ROW = re.compile(r"^\| `(\w+)` \| (.+) \| (\d+) \|$", re.MULTILINE)
REGISTRIES = {"families/registry.py", "verify/references/registry.py"}
TOLERANCE = 0.1
# lines of facts, layout rule, prompt and plan, the reference not counted
MOST = {
    "idefics3": 220, "llava_qwen": 220, "video_llama_3": 220, "videollama3_qwen2": 100, "bee": 60, "r_4b": 60,
    "ovis2_6": 40,
}  # fmt: skip
MOST_OF_EXPERTS = 140  # of the sparse MLP in `lm/`

# family -> ((file, the name in it where only that is the family's), ...), lines
ROWS = {
    name: (re.findall(r"`([\w/]+\.py)(?:: (\w+))?`", files), int(lines))
    for name, files, lines in ROW.findall(PAGE.read_text(encoding="utf-8"))
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
    listed = {file for file, _ in ROWS[name][0] if not file.startswith("tiling/")}
    relatives = {file for other, (rows, _) in ROWS.items() for file, _ in rows if other != name} - listed
    assert files - {f"tiling/{name}.py"} - relatives == listed | REGISTRIES


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layout_rule_of_its_own_is_nobody_elses(name: str) -> None:
    """But those of families that derive from it."""
    for file in (PACKAGE / file for file, _ in ROWS[name][0] if file.startswith("tiling/")):
        sources = {family: (PACKAGE / f"families/{family}.py").read_text(encoding="utf-8") for family in FAMILIES}
        users = [family for family, text in sources.items() if f"siglane.tiling.{file.stem}" in text]
        assert [family for family in users if f"siglane.families.{name}" not in sources[family]] == [name]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_lines_are_counted(name: str) -> None:
    files, stated = ROWS[name]
    counted = sum(len((PACKAGE / file).read_text().splitlines()) for file, only in files if not only)
    assert abs(counted - stated) <= TOLERANCE * stated, f"{name} has {counted} lines, the page says {stated}"


@pytest.mark.parametrize("name", MOST)
def test_a_family_is_short(name: str) -> None:
    files = [PACKAGE / file for file, only in ROWS[name][0] if not only and not file.startswith("verify/")]
    assert sum(len(file.read_text().splitlines()) for file in files) <= MOST[name]


def test_a_sparse_mlp_is_short() -> None:
    assert len((PACKAGE / "lm/experts.py").read_text(encoding="utf-8").splitlines()) <= MOST_OF_EXPERTS
