"""The engine's process, from the inside: reads requests while there are any, computes, writes what it has."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NamedTuple

from siglane.engine.embed_worker import EmbedWorker
from siglane.engine.engine import Engine
from siglane.engine.load import load_engine, load_tagger, load_with_tagger
from siglane.errors import EngineError, SiglaneError
from siglane.families.two_tower import Calibration, LoadedTwoTower, has_both_towers
from siglane.settings.engine import EngineConfig
from siglane.types import Finished, Request, TokenDelta
from siglane.weights.demo import open_model

logger = logging.getLogger(__name__)

STATS_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What a child needs to load its models.

    model: a checkpoint folder or hub id of a vision-language model, or of a SigLIP with both towers, which embeds;
    revision: its; tagger: a SigLIP that embeds beside a vision-language model, None for none.
    """

    model: str
    config: EngineConfig
    revision: str | None = None
    tagger: str | None = None


class EngineFacts(NamedTuple):
    """What the parent learns once all is loaded."""

    context_length: int | None  # tokens of prompt and answer together, None where no model chats
    calibration: Calibration | None = None  # of the towers, on the host, None without them
    not_shared_because: str | None = None  # of `LoadedTwoTower`


def run_child(pipe: Connection, spec: EngineSpec) -> None:
    """The engine's process: reads requests while there are any, computes, writes what it has."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides when to end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    try:
        engine, two_tower = _load(spec)
    except SiglaneError as error:
        _write(pipe, "failed", error)
        return
    except Exception as error:
        logger.exception("the engine could not be built")
        _write(pipe, "failed", EngineError(f"the engine could not be built: {error}", code="engine_start"))
        return
    try:
        if engine is not None:
            _write(pipe, "stats", engine.stats())
        _write(pipe, "ready", _facts(engine, two_tower))
        _serve(pipe, engine, None if two_tower is None else EmbedWorker(two_tower.model, spec.config))
    except (EOFError, OSError):
        logger.info("the parent is gone; the engine ends")


def _load(spec: EngineSpec) -> tuple[Engine | None, LoadedTwoTower | None]:
    """What chats and what embeds; at least one of them."""
    if spec.tagger is not None:
        return load_with_tagger(spec.model, spec.tagger, spec.config, spec.revision)
    if has_both_towers(open_model(spec.model, spec.revision)):
        return None, load_tagger(spec.model, spec.config, spec.revision)
    return load_engine(spec.model, spec.config, spec.revision), None


def _facts(engine: Engine | None, two_tower: LoadedTwoTower | None) -> EngineFacts:
    context_length = None if engine is None else engine.context_length
    if two_tower is None:
        return EngineFacts(context_length)
    scale, bias = two_tower.model.calibration
    return EngineFacts(context_length, Calibration(scale.cpu(), bias.cpu()), two_tower.not_shared_because)


def _serve(pipe: Connection, engine: Engine | None, worker: EmbedWorker | None) -> None:
    """A step of the engine and a forward of the worker take turns."""
    told = 0.0
    while True:
        generating = engine is not None and engine.has_work
        if engine is not None and (not generating or time.monotonic() - told > STATS_SECONDS):
            told = time.monotonic()
            _write(pipe, "stats", engine.stats())
        patience = 0 if generating or (worker is not None and worker.has_work) else None
        while pipe.poll(patience):
            match pickle.loads(pipe.recv_bytes()):
                case "close", _:
                    return
                case "embed", items if worker is not None:
                    for number, item in items:
                        worker.add(number, item)
                case "forget", number if worker is not None:
                    worker.forget(number)
                case kind, value if engine is not None:
                    answers = [_take(engine, one) for one in value] if kind == "add" else [engine.abort(value)]
                    if ended := [delta for delta in answers if delta is not None]:
                        _write(pipe, "deltas", ended)
            patience = 0
        deltas = engine.step() if engine is not None and engine.has_work else []
        if deltas:
            _write(pipe, "deltas", deltas)
        if worker is not None and worker.has_work:
            _write(pipe, "embeddings", worker.step())


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
