"""Every row of docs/faults.md as it happens to a server of real sockets, beside a good request, which gets exactly what
it gets alone: the same text, token ids and usage."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

import faults_clients
import faults_engine
import faults_files
import faults_images
import faults_requests
import faults_urls
import pytest
from faults import Row, Stage, play
from serving import RunningServer, Told, running

from siglane.engine.process.child import EngineSpec
from siglane.engine.process.supervisor import EngineProcess
from siglane.families.processor import Processor

MODULES = (faults_images, faults_urls, faults_requests, faults_clients, faults_engine, faults_files)
ROOT = Path(__file__).parents[2]
ROWS: list[Row] = sorted((row for module in MODULES for row in module.TABLE), key=lambda row: row.number)
# torch raises its OutOfMemoryError for CUDA's memory alone; what an exception in a step costs is row 47
ON_A_GPU = {68}


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=f"{row.number} {row.what}", marks=[pytest.mark.slow] * row.slow) for row in ROWS]
)
def test_the_row(
    row: Row,
    server: RunningServer,
    alone: Told,
    processor: Processor,
    engine: EngineProcess,
    spec: EngineSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with running(processor, engine, **row.options) if row.options else nullcontext(server) as one:
        play(row, Stage(one, alone, processor, engine, spec, tmp_path, monkeypatch, caplog))


DOCUMENT = re.compile(r"\| (\d+) \| .+ \| (.+) \| (.*)\|")


def documented() -> dict[int, tuple[str, list[tuple[str, str]]]]:
    """The answer of each row of docs/faults.md, and its (file, test)."""
    lines = (ROOT / "docs/faults.md").read_text().splitlines()
    found = [row for row in map(DOCUMENT.fullmatch, lines) if row]
    return {int(row[1]): (row[2], re.findall(r"`(\w+): (\w+)`", row[3])) for row in found}


def test_every_row_is_played() -> None:
    assert list(documented()) == list(range(1, 71))
    assert {row.number for row in ROWS} == {*documented()} - ON_A_GPU


def test_the_tests_that_look_closer_are_there() -> None:
    for number, (_, tests) in documented().items():
        for stem, name in tests:
            (file,) = (ROOT / "tests").rglob(f"{stem}.py")
            assert re.search(rf"def {name}\(", file.read_text()), f"row {number}: {file.name} has no {name}"


def test_codes_are_those_that_are_documented() -> None:
    """Of every row of the tables of refusals."""
    told = {number: set(re.findall(r"`(\w+_\w+)`", answer)) for number, (answer, _) in documented().items()}
    refused = {**faults_images.REFUSED, **faults_urls.REFUSED, **faults_requests.REFUSED}
    for number, codes in told.items():
        played = {case.code for name, case in refused.items() if int(name.split()[0]) == number}
        assert not played or codes <= played, (number, codes, played)
