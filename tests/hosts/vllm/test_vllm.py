"""siglane's answers against those of vLLM's own CPU engine, from the same tiny checkpoints (`make test-vllm`).

Both run in float32. The largest difference of two log-probabilities measured is 8e-5 for Ovis2.5 and 2e-5 for
LLaVA-OneVision. `WRITE_GOLDEN=1 make test-vllm` stores what vLLM says for tests/parity/test_vllm_golden.py.

LLaVA-OneVision with several pictures is not compared: vLLM cuts each of them into tiles as if it were alone, while the
reference makes one tile of each (transformers' processor with the pictures of a request as one list). The last test
holds on to that difference.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from vllm_cases import (
    FAMILIES,
    QUESTION,
    Answer,
    Case,
    Picture,
    ask_siglane,
    check_that_pictures_matter,
    compare,
    read_golden,
    write_golden,
)
from vllm_host import ask_vllm

SEVERAL: Case = (Picture(60, 60, 14), Picture(60, 120, 15), QUESTION)


@dataclass(frozen=True, slots=True)
class Asked:
    """ours, theirs: answers by case; several: vLLM's to SEVERAL, None where the cases have such a prompt."""

    family: str
    folder: Path
    ours: dict[str, Answer]
    theirs: dict[str, Answer]
    several: Answer | None


@pytest.fixture(scope="module", params=FAMILIES)
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    name: str = request.param
    family = FAMILIES[name]
    folder, scratch = tmp_path_factory.mktemp(name), tmp_path_factory.mktemp("pictures")
    family.write(folder, family.seed)
    more = {"several": SEVERAL} if name == "llava_onevision" else {}
    version, theirs = ask_vllm(folder, {**family.cases, **more}, scratch)
    several = theirs.pop("several", None)
    if os.environ.get("WRITE_GOLDEN"):
        write_golden(name, version, theirs)
    return Asked(name, folder, ask_siglane(folder, family.cases), theirs, several)


def test_the_answers_are_the_same(asked: Asked) -> None:
    worst = {case: compare(asked.ours[case], theirs) for case, theirs in asked.theirs.items()}
    for case, difference in worst.items():
        print(f"{asked.family}, {case}: log-probabilities within {difference:.1e}")


def test_pictures_matter(asked: Asked) -> None:
    check_that_pictures_matter(asked.theirs)


def test_the_stored_answers_are_vllms(asked: Asked) -> None:
    stored = read_golden(asked.family)
    assert stored.keys() == asked.theirs.keys()
    for case, theirs in asked.theirs.items():
        compare(stored[case], theirs)


@pytest.mark.parametrize("asked", ["llava_onevision"], indirect=True)
def test_vllm_tiles_each_of_several_pictures(asked: Asked) -> None:
    assert asked.several is not None
    first, second, question = SEVERAL
    alone = {"first": (first, question), "second": (second, question), "text": (question,), "both": SEVERAL}
    tokens = {case: answer.prompt_tokens for case, answer in ask_siglane(asked.folder, alone).items()}
    assert asked.several.prompt_tokens == tokens["first"] + tokens["second"] - tokens["text"]
    assert tokens["both"] == tokens["text"] + 2 * (16 + 1)  # 4x4 patches and a newline each
