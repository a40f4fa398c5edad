"""siglane's answers against what vLLM 0.32 said of the same tiny checkpoints (golden/vllm_*.json).

`make test-vllm` asks vLLM again; tests/hosts/vllm says how the files are written.
"""

from __future__ import annotations

import pytest
from vllm_cases import FAMILIES, ask_siglane, check_that_pictures_matter, compare, read_golden

FEW = ("text", "enlarged", "another video")


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("ovis2_5", FEW),  # its pictures are large
        pytest.param("ovis2_5", None, marks=pytest.mark.slow),
        ("llava_onevision", None),
    ],
)
def test_the_answers_are_vllms(
    name: str, cases: tuple[str, ...] | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    family, golden = FAMILIES[name], read_golden(name)
    check_that_pictures_matter(golden)
    assert golden.keys() == family.cases.keys()
    folder = tmp_path_factory.mktemp(name)
    family.write(folder, family.seed)
    asked = {case: parts for case, parts in family.cases.items() if cases is None or case in cases}
    for case, ours in ask_siglane(folder, asked).items():
        compare(ours, golden[case])


def test_every_family_is_among_them() -> None:
    assert {"ovis2_5", "llava_onevision"} == FAMILIES.keys()
