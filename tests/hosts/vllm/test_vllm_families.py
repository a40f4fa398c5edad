"""Every family inside the real vLLM answers as in siglane's own engine, with chunks smaller than most pictures: all
cases at once, then each alone, when its prompt is known already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from checkpoints import large_heads
from host_cases import (
    FAMILIES,
    QUESTION,
    TOKENS,
    Case,
    Drawn,
    ask_siglane,
    cases_of,
    check_that_answers_discriminate,
    conversation,
    write_checkpoint,
)
from PIL import Image
from vllm_host import READY, RunningEngine, vllm_engine

from siglane.families.registry import VLM_FAMILIES
from siglane.llm import Generation

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not READY.exists(), reason="vLLM has an environment of its own: make test-vllm builds it"),
]

CHUNK = 32  # tokens of a step; a page holds as many


@dataclass(frozen=True)
class Running:
    """An engine with one family's checkpoint, and siglane's own answers to all cases."""

    folder: Path
    engine: RunningEngine
    cases: Mapping[str, Case]
    expected: list[Generation]

    @property
    def conversations(self) -> list[Any]:
        return [conversation(case) for case in self.cases.values()]


@pytest.fixture(scope="module", params=FAMILIES)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    name, folder = request.param, tmp_path_factory.mktemp("families")
    with large_heads():
        write_checkpoint(name, folder / name, FAMILIES[name].large_seed)
    cases = cases_of(name)
    expected = ask_siglane(folder / name, list(cases.values()))
    every = ",".join(family.name for family in VLM_FAMILIES)
    env = {"SIGLANE_VLLM_VIEWS": str(folder / "views"), "SIGLANE_VLLM_OVERRIDE": every}
    options = {"max_num_batched_tokens": CHUNK, "block_size": CHUNK}
    with vllm_engine(folder / name, env=env, **options) as engine:
        yield Running(folder / name, engine, cases, expected)


def test_siglane_serves_it(running: Running) -> None:
    words = running.engine.log.read_text()
    assert f"siglane: {running.folder} is served by siglane's tower, through " in words
    assert "encoder replicate, rank 0 of 1 holds" in words
    assert "warmup failed" not in words


def test_the_answers_tell_pictures_apart(running: Running) -> None:
    check_that_answers_discriminate(running.expected)


def test_all_cases_at_once(running: Running) -> None:
    compare(running, running.engine.chat(running.conversations, TOKENS))


def test_each_case_alone_its_prompt_known(running: Running) -> None:
    answers = [running.engine.chat([one], TOKENS)[0] for one in running.conversations]
    compare(running, answers)
    for answer in answers:
        assert answer["cached_tokens"] >= (answer["prompt_tokens"] - 1) // CHUNK * CHUNK


def test_pictures_of_one_colour_and_of_other_shapes(running: Running) -> None:
    """Their bytes are the same."""
    drawn = [Drawn(Image.new("RGB", size, "gray")) for size in ((60, 40), (40, 60), (60, 40))]
    cases: list[Case] = [(one, QUESTION) for one in drawn]
    answers = [running.engine.chat([conversation(case)], 16)[0] for case in cases]
    expected = ask_siglane(running.folder, cases, 16)
    assert [one["token_ids"] for one in answers] == [list(one.output_token_ids) for one in expected]


def compare(running: Running, answers: list[dict[str, Any]]) -> None:
    errors = {name: answer["error"] for name, answer in zip(running.cases, answers, strict=True) if "error" in answer}
    assert not errors, errors
    found = {name: (one["prompt_tokens"], one["token_ids"]) for name, one in zip(running.cases, answers, strict=True)}
    said = {
        name: (one.usage.prompt_tokens, list(one.output_token_ids))
        for name, one in zip(running.cases, running.expected, strict=True)
    }
    assert found == said
