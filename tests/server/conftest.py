from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))  # the writers of tiny checkpoints live there

from checkpoints import write_nvila_checkpoint
from serving import RunningServer, running

from siglane.engine.child import EngineSpec
from siglane.engine.process import EngineProcess
from siglane.families.processor import Processor, load_processor
from siglane.settings.engine import EngineConfig
from siglane.weights.hub import open_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server") / "tiny"
    write_nvila_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def processor(checkpoint: Path) -> Processor:
    return load_processor(open_checkpoint(checkpoint))


@pytest.fixture(scope="session")
def spec(checkpoint: Path) -> EngineSpec:
    return EngineSpec(str(checkpoint), EngineConfig(device="cpu", threads=1, kv_tokens=65536))


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
