"""Every family inside SGLang answers as in siglane's own engine, request by request and all at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from host_cases import FAMILIES, Case, ask_siglane, cases_of, check_that_answers_discriminate, write_checkpoint
from sglang_cases import Served, ask_sglang, compare, serve, served
from sglang_host import RunningEngine, sglang_engine

from siglane.llm import Generation


@dataclass(frozen=True)
class Running:
    """An engine with one family's checkpoint, and siglane's own answers to all cases: with that one and another."""

    served: Served
    engine: RunningEngine
    cases: Mapping[str, Case]
    expected: list[Generation]
    other: Path
    expected_of_other: list[Generation]

    @property
    def requests(self) -> list[dict[str, Any]]:
        return [self.served.request(case) for case in self.cases.values()]


@pytest.fixture(scope="module", params=FAMILIES)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    name, folder = request.param, tmp_path_factory.mktemp("families")
    cases = cases_of(name)
    one = serve(name, folder)
    write_checkpoint(name, folder / "other", FAMILIES[name].seeds[1])
    other = served(folder / "other", folder / "views of other", {})
    expected, of_other = (ask_siglane(served.folder, list(cases.values())) for served in (one, other))
    with sglang_engine(one.folder, env=one.env, log_level="info") as engine:
        print(f"\n{name}: ready after {engine.start_seconds:.0f} s")
        yield Running(one, engine, cases, expected, other.view, of_other)


def test_siglane_serves_it(running: Running) -> None:
    words = running.engine.log.read_text()
    assert f"siglane: {running.served.folder} is served by siglane's tower, through {running.served.view}\n" in words
    assert "encoder replicate, rank 0 of 1 holds" in words


def test_the_answers_tell_pictures_apart(running: Running) -> None:
    check_that_answers_discriminate([*running.expected, *running.expected_of_other])


def test_all_cases_at_once(running: Running) -> None:
    compare(ask_sglang(running.engine, running.requests), running.expected, list(running.cases))


def test_each_case_alone_and_with_other_weights(running: Running) -> None:
    """New weights empty the caches: nothing of an answer was computed with the old ones."""
    running.engine.load_weights(running.other)
    answers = [ask_sglang(running.engine, [request])[0] for request in running.requests]
    compare(answers, running.expected_of_other, list(running.cases))
