from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_checkpoint import write_calling_checkpoint
from serving import RunningServer, Told, ask_good, running, serving_folder

from siglane.engine.process.child import EngineSpec
from siglane.engine.process.supervisor import EngineProcess
from siglane.errors import EngineError
from siglane.families.processor import Processor, load_processor
from siglane.server.choices import Choices
from siglane.settings.engine import EngineConfig
from siglane.weights.hub import open_checkpoint

TABLES = ("images", "urls", "requests", "clients", "engine", "files")
pytest.register_assert_rewrite("faults", *(f"faults_{table}" for table in TABLES))


@pytest.fixture(scope="session")
def processor(nvila_folder: Path) -> Processor:
    return load_processor(open_checkpoint(nvila_folder))


@pytest.fixture(scope="session")
def spec(nvila_folder: Path) -> EngineSpec:
    return EngineSpec(str(nvila_folder), EngineConfig(device="cpu", threads=1, kv_tokens=65536))


@pytest.fixture(scope="session")
def engine(spec: EngineSpec) -> Iterator[EngineProcess]:
    process = EngineProcess(spec)
    process.start()
    yield process
    process.close()


@pytest.fixture(scope="session")
def server(processor: Processor, engine: EngineProcess) -> Iterator[RunningServer]:
    with running(processor, engine) as one:
        yield one


@pytest.fixture(scope="module")
def stored(
    processor: Processor, engine: EngineProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """One that keeps files and batches."""
    with running(processor, engine, data_dir=tmp_path_factory.mktemp("data")) as one:
        yield one


@pytest.fixture(scope="module")
def alone(server: RunningServer) -> Told:
    """What the good request gets when nothing else happens."""
    told = ask_good(server)
    assert told.done
    assert told.usage["completion_tokens"] == len(told.tokens)
    return told


@pytest.fixture(scope="session")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A model that calls tools as its script says."""
    folder: Path = tmp_path_factory.mktemp("caller") / "tiny"
    write_calling_checkpoint(folder)
    with serving_folder(folder) as one:
        yield one


@pytest.fixture
def broken_after_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that fails with "it broke" behind three tokens."""
    take, taken = Choices._take, itertools.count()

    def failing(self: Choices, delta: Any) -> None:
        if next(taken) >= 3:
            raise EngineError("it broke", code="engine_broken")
        take(self, delta)

    monkeypatch.setattr(Choices, "_take", failing)
