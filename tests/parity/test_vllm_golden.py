"""siglane's answers against what vLLM 0.32 said of the same tiny checkpoints (golden/vllm_*.json).

`make test-vllm` asks vLLM again; tests/hosts/vllm says how the files are written.
"""

from __future__ import annotations

import pytest
from vllm_cases import FAMILIES, ask_siglane, check_that_pictures_matter, compare, read_golden


@pytest.mark.parametrize(
    "name",
    [pytest.param("ovis2_5", marks=pytest.mark.slow), "llava_onevision"],  # the former's pictures are large
)
def test_the_answers_are_vllms(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    family, golden = FAMILIES[name], read_golden(name)
    check_that_pictures_matter(golden)
    assert golden.keys() == family.cases.keys()
    folder = tmp_path_factory.mktemp(name)
    family.write(folder, family.seed)
    for case, ours in ask_siglane(folder, family.cases).items():
        compare(ours, golden[case])


def test_every_family_is_among_them() -> None:
    assert {"ovis2_5", "llava_onevision"} == FAMILIES.keys()
