"""The engine's process, from the inside: reads requests while there are any, computes, writes what it has."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NamedTuple

from siglane.engine.embed_worker import Calibration, Embedding, EmbeddingJob, EmbeddingQueue, Item, compute
from siglane.engine.engine import Engine
from siglane.engine.load import load_engine, load_with_tagger
from siglane.errors import EngineError, SiglaneError
from siglane.families.two_tower import LoadedTwoTower, TwoTowerModel
from siglane.settings.engine import EngineConfig
from siglane.types import Finished, Request, TokenDelta

logger = logging.getLogger(__name__)

STATS_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What a child needs to build its engine: a checkpoint folder or hub id, and the engine's configuration.

    tagger: a SigLIP with both towers that embeds pictures and texts beside the chat, None for none.
    """

    model: str
    config: EngineConfig
    revision: str | None = None
    tagger: str | None = None


def run_child(pipe: Connection, spec: EngineSpec) -> None:
    """The engine's process: reads requests while there are any, computes, writes deltas."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides when to end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    try:
        engine, towers = _load(spec)
    except SiglaneError as error:
        _write(pipe, "failed", error)
        return
    except Exception as error:
        logger.exception("the engine could not be built")
        _write(pipe, "failed", EngineError(f"the engine could not be built: {error}", code="engine_start"))
        return
    try:
        _write(pipe, "stats", engine.stats())
        tagger = None if towers is None else TaggerFacts(Calibration.of(towers.model), towers.apart)
        _write(pipe, "ready", EngineFacts(engine.context_length, tagger))
        _serve(pipe, engine, None if towers is None else Towers(towers.model, spec.config, pipe))
    except (EOFError, OSError):
        logger.info("the parent is gone; the engine ends")


def _load(spec: EngineSpec) -> tuple[Engine, LoadedTwoTower | None]:
    if spec.tagger is None:
        return load_engine(spec.model, spec.config, spec.revision), None
    return load_with_tagger(spec.model, spec.tagger, spec.config, spec.revision)


class TaggerFacts(NamedTuple):
    """What the parent learns of the towers. apart: as in `LoadedTwoTower`."""

    calibration: Calibration
    apart: str | None


class EngineFacts(NamedTuple):
    """What the parent learns of an engine that is ready. context_length: as in `Engine`."""

    context_length: int
    tagger: TaggerFacts | None


class Towers:
    """The SigLIP beside the engine: its forwards take turns with the engine's steps."""

    def __init__(self, model: TwoTowerModel, config: EngineConfig, pipe: Connection) -> None:
        self._model, self._pipe = model, pipe
        self._queue = EmbeddingQueue(config, model.logit_scale.device)
        self._jobs: dict[int, EmbeddingJob] = {}

    @property
    def has_work(self) -> bool:
        return len(self._queue) > 0

    def add(self, number: int, item: Item) -> None:
        job = EmbeddingJob(item)
        self._jobs[number] = job
        job.future.add_done_callback(lambda future: self._ended(number, future))
        self._queue.add(job)

    def forget(self, number: int) -> None:
        if number in self._jobs:
            self._jobs[number].future.cancel()

    def step(self) -> None:
        compute(self._model, self._queue.take())

    def _ended(self, number: int, future: Future[Embedding]) -> None:
        del self._jobs[number]
        if not future.cancelled():
            _write(self._pipe, "embedding", (number, future.exception() or future.result()))


def _serve(pipe: Connection, engine: Engine, towers: Towers | None) -> None:
    told = 0.0
    while True:
        if not engine.has_work or time.monotonic() - told > STATS_SECONDS:
            told = time.monotonic()
            _write(pipe, "stats", engine.stats())
        patience = 0 if engine.has_work or (towers and towers.has_work) else None
        while pipe.poll(patience):
            kind, value = pickle.loads(pipe.recv_bytes())
            match kind:
                case "close":
                    return
                case "embed" if towers:
                    towers.add(*value)
                case "forget" if towers:
                    towers.forget(value)
                case _:
                    answers = [_take(engine, one) for one in value] if kind == "add" else [engine.abort(value)]
                    if ended := [delta for delta in answers if delta is not None]:
                        _write(pipe, "deltas", ended)
            patience = 0
        if engine.has_work and (deltas := engine.step()):
            _write(pipe, "deltas", deltas)
        if towers and towers.has_work:
            towers.step()


def _end_with_parent() -> None:
    """The pipe tells of the parent's end too, but is not looked at during a step or while the model loads."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _take(engine: Engine, request: Request) -> TokenDelta | None:
    """Queues a request; one that can never run ends here with its error."""
    try:
        engine.add(request)
    except SiglaneError as error:
        return TokenDelta(request.request_id, finished=Finished("error", error=error))
    except Exception as error:
        logger.exception("request %s could not be queued", request.request_id)
        reason = EngineError(f"the request could not be queued ({type(error).__name__})")
        return TokenDelta(request.request_id, finished=Finished("error", error=reason))
    return None


def _write(pipe: Connection, kind: str, value: object) -> None:
    pipe.send_bytes(pickle.dumps((kind, value), protocol=5))
