"""What a row of docs/faults.md is: something that happens to a real server beside a good request."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from serving import CHAT, RunningServer, Told, assert_error, assert_unharmed, running

from siglane.engine.process.child import EngineSpec
from siglane.engine.process.supervisor import EngineProcess
from siglane.families.processor import Processor, load_processor
from siglane.weights.hub import open_checkpoint

FIRST_IMAGE = "messages[0].content[0]"
SECRET = "s3cr3t"  # in URLs, keys and paths: no answer has it
JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class Stage:
    """Where a row is played. server: with the row's options, on an engine that all share; alone: what the good request
    gets when nothing else happens; folder: empty, the row's own."""

    server: RunningServer
    alone: Told
    processor: Processor
    engine: EngineProcess
    spec: EngineSpec
    folder: Path
    patch: pytest.MonkeyPatch
    log: pytest.LogCaptureFixture

    def another(self, **options: Any) -> AbstractContextManager[RunningServer]:
        """A server beside the one of the good request, on the same engine."""
        return running(self.processor, self.engine, **options)


Play = Callable[[Stage], object]


@dataclass(frozen=True)
class Row:
    """number: of docs/faults.md; options: of the server; lost: whoever is in flight goes down with the fault, as is
    documented, so that the row itself asks the good request before and behind it."""

    number: int
    what: str
    play: Play
    options: Mapping[str, Any]
    slow: bool = False
    lost: bool = False


class Table(list[Row]):
    def row(
        self, number: int, what: str, *, slow: bool = False, lost: bool = False, **options: Any
    ) -> Callable[[Play], Play]:
        """Adds what is decorated."""

        def add(play: Play) -> Play:
            self.append(Row(number, what, play, options, slow, lost))
            return play

        return add


def play(row: Row, stage: Stage) -> None:
    if row.lost:
        row.play(stage)
    else:
        assert_unharmed(stage.server, stage.alone, partial(row.play, stage))


class Refused(NamedTuple):
    """A request and its refusal. asked: JSON, or the body's bytes; says: words of the message."""

    asked: dict[str, Any] | bytes
    code: str
    param: str | None = None
    says: str = ""
    status: int = 400
    headers: Mapping[str, str] = JSON


def refuse(cases: Mapping[str, Refused], stage: Stage) -> None:
    """Every second one is asked for as a stream, which must not begin."""
    with stage.server.http() as client:
        for number, (name, case) in enumerate(cases.items()):
            body = {"content": case.asked, "headers": case.headers}
            if isinstance(case.asked, dict):
                body = {"json": case.asked | ({"stream": True} if number % 2 else {})}
            answer = client.post(CHAT, **body)
            try:
                assert_error(answer, case.status, case.code, case.param)
                assert case.says in answer.json()["error"]["message"]
                assert SECRET not in answer.text
            except AssertionError as error:
                error.add_note(name)
                raise


def refusals(cases: Mapping[str, Refused]) -> Table:
    """A row for each number that the names begin with."""
    numbered = itertools.groupby(cases.items(), lambda item: int(item[0].split()[0]))
    return Table(Row(number, "refused", partial(refuse, dict(some)), {}) for number, some in numbered)


def copied(stage: Stage, name: str = "model") -> Path:
    """The model's folder, of which any file may be `rewritten`: all are links."""
    folder = stage.folder / name
    for file in Path(stage.spec.model).rglob("*"):
        if file.is_file():
            target = folder / file.relative_to(stage.spec.model)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(file)
    return folder


def rewritten(file: Path, data: bytes | str) -> None:
    """Without touching what is linked to it."""
    file.unlink()
    file.write_bytes(data if isinstance(data, bytes) else data.encode())


@contextmanager
def started(stage: Stage, folder: Path) -> Iterator[RunningServer]:
    """A server of another model, with an engine of its own."""
    engine = EngineProcess(replace(stage.spec, model=str(folder)))
    engine.start()
    try:
        with running(load_processor(open_checkpoint(folder)), engine) as server:
            yield server
    finally:
        engine.close()
