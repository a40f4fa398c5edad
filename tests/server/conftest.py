from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted_checkpoint import write_calling_checkpoint
from serving import RunningServer, Told, ask_good, running

from siglane.engine.child import EngineSpec
from siglane.engine.process import EngineProcess
from siglane.families.processor import Processor, load_processor
from siglane.settings.engine import EngineConfig
from siglane.weights.hub import open_checkpoint


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
    engine = EngineProcess(EngineSpec(str(folder), EngineConfig(device="cpu", threads=1, kv_tokens=8192)))
    engine.start()
    with running(load_processor(open_checkpoint(folder)), engine) as one:
        yield one
    engine.close()
