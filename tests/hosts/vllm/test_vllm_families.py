"""Every family inside the real vLLM answers as in siglane's own engine, with chunks smaller than its pictures: all
cases at once, streamed, then each alone, when its prompt is known already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

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
    write_checkpoint,
)
from PIL import Image
from vllm_client import Heard, TokenClient
from vllm_host import Imported, vllm_server

from siglane.families.registry import VLM_FAMILIES
from siglane.llm import Generation

CHUNK, PAGE = 16, 32  # tokens of a step, and of what the prefix cache keeps or not
OTHER_NAMES = {"vila": "nvila", "smolvlm2": "idefics3"}  # of two families, by a checkpoint's layout or a model
OPTIONS = {"max_num_batched_tokens": CHUNK, "block_size": PAGE, "enable_prompt_tokens_details": True}


@dataclass(frozen=True)
class Running:
    """A server with one family's checkpoint, and siglane's own answers to all cases."""

    folder: Path
    client: TokenClient
    cases: Mapping[str, Case]
    expected: list[Generation]


@pytest.fixture(scope="module", params=FAMILIES)
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, imported: Imported
) -> Iterator[Running]:
    name, root = request.param, tmp_path_factory.mktemp("families")
    folder = root / name
    with large_heads():
        write_checkpoint(name, folder, FAMILIES[name].large_seed)
    cases = cases_of(name)
    expected = ask_siglane(folder, list(cases.values()))
    every = ",".join(family.name for family in VLM_FAMILIES)
    env = {"SIGLANE_VLLM_VIEWS": str(root / "views"), "SIGLANE_VLLM_OVERRIDE": every}
    with vllm_server(folder, env=env, imported=imported, **OPTIONS) as server:
        print(f"\n{name}: healthy after {server.start_seconds:.0f} s")
        yield Running(folder, TokenClient(server, str(folder)), cases, expected)


def test_no_family_is_left_out() -> None:
    assert {OTHER_NAMES.get(name, name) for name in FAMILIES} == {family.name for family in VLM_FAMILIES}


def test_siglane_serves_it(running: Running) -> None:
    words = running.client.server.log.read_text()
    assert f"siglane: {running.folder} is served by siglane's tower, through " in words
    assert "encoder replicate, rank 0 of 1 holds" in words
    assert "warmup failed" not in words


def test_a_chunk_is_smaller_than_a_picture(running: Running) -> None:
    (large,) = (said for name, said in zip(running.cases, running.expected, strict=True) if name == "large")
    assert large.usage.image_tokens > CHUNK


def test_the_answers_tell_pictures_apart(running: Running) -> None:
    check_that_answers_discriminate(running.expected)


def test_all_cases_at_once_streamed(running: Running) -> None:
    compare(running, running.client.stream_at_once(list(running.cases.values()), TOKENS))


def test_each_case_alone_its_prompt_known(running: Running) -> None:
    answers = [running.client.ask(case, TOKENS) for case in running.cases.values()]
    compare(running, answers)
    for answer in answers:
        assert answer.cached >= (answer.prompt - 1) // PAGE * PAGE


def test_pictures_of_one_colour_and_of_other_shapes(running: Running) -> None:
    """Their bytes are the same."""
    drawn = [Drawn(Image.new("RGB", size, "gray")) for size in ((60, 40), (40, 60), (60, 40))]
    cases: list[Case] = [(one, QUESTION) for one in drawn]
    answers = [running.client.ask(case, 16) for case in cases]
    expected = ask_siglane(running.folder, cases, 16)
    assert [one.token_ids for one in answers] == [list(one.output_token_ids) for one in expected]


def compare(running: Running, answers: list[Heard]) -> None:
    found = {name: (one.prompt, one.token_ids) for name, one in zip(running.cases, answers, strict=True)}
    said = {
        name: (one.usage.prompt_tokens, list(one.output_token_ids))
        for name, one in zip(running.cases, running.expected, strict=True)
    }
    assert found == said
