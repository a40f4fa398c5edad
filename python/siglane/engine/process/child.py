"""The engine's process, from the inside: reads requests while there are any, computes, writes what it has."""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from siglane.engine.engine import Engine
from siglane.engine.process.embed_worker import EmbedWorker
from siglane.engine.process.load import load_engine, load_tagger, load_with_tagger
from siglane.engine.process.pulse import Pulse, Watch, turn_seconds, work_done
from siglane.engine.process.wire import Channel, EngineFacts, frame
from siglane.errors import EngineError, SiglaneError
from siglane.families.two_tower import Calibration, LoadedTwoTower, has_both_towers
from siglane.settings.engine import EngineConfig
from siglane.types import Finished, Request, TokenDelta
from siglane.weights.demo import open_model
from siglane.weights.hub import Checkpoint

logger = logging.getLogger(__name__)

STATS_SECONDS = 0.5
HUNG = 75  # exit code of a process whose engine did not move; sysexits.h: a temporary failure
STACK_DEPTH = 8  # calls of a hung engine that its log line names


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What a child needs to load its models.

    model: a checkpoint folder or hub id of a vision-language model, or of a SigLIP with both towers, which embeds;
    revision: its; tagger: a SigLIP that embeds beside a vision-language model, None for none; adapter, verify_weights:
    as of `open_model`.
    """

    model: str
    config: EngineConfig
    revision: str | None = None
    tagger: str | None = None
    adapter: str | None = None
    verify_weights: bool | None = None

    def open(self) -> Checkpoint:
        """The files of `model`. UserError as `open_model`."""
        return open_model(self.model, self.revision, adapter=self.adapter, verify_weights=self.verify_weights)

    def open_tagger(self) -> Checkpoint | None:
        """The files of `tagger`."""
        return None if self.tagger is None else open_model(self.tagger, verify_weights=self.verify_weights)


def run_child(end: Any, spec: EngineSpec, prepare: Callable[[], None] | None = None) -> None:
    """The engine's process: reads requests while there are any, computes, writes what it has.

    end: a socket to the parent; prepare: called first of all, for its log.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides when to end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    if prepare is not None:
        prepare()
    channel = Channel(end)
    try:
        threading.Thread(target=_beat, args=(channel, spec.config), name="heartbeat", daemon=True).start()
        limit = spec.config.load_timeout
        with Watch(work_done, limit, functools.partial(_end_load, channel, threading.get_ident(), limit)):
            loaded = _load_or_tell(channel, spec)
        if loaded is not None:
            _run(channel, spec, *loaded)
    except (EOFError, OSError):
        logger.info("the parent has hung up; the engine ends")
    except Exception:
        logger.critical("the engine's process cannot go on", exc_info=True)
        sys.exit(1)


def _load_or_tell(channel: Channel, spec: EngineSpec) -> tuple[Engine | None, LoadedTwoTower | None] | None:
    """What was loaded; None when the parent has been told why nothing can be."""
    try:
        return _load(spec)
    except SiglaneError as error:
        channel.send(frame("failed", error))
    except Exception as error:
        logger.exception("the engine could not be built")
        channel.send(frame("failed", EngineError(f"the engine could not be built: {error}", code="engine_start")))
    return None


def _load(spec: EngineSpec) -> tuple[Engine | None, LoadedTwoTower | None]:
    """What chats and what embeds; at least one of them."""
    checkpoint, tagger = spec.open(), spec.open_tagger()
    if tagger is not None:
        return load_with_tagger(checkpoint, tagger, spec.config)
    if has_both_towers(checkpoint):
        return None, load_tagger(checkpoint, spec.config)
    return load_engine(checkpoint, spec.config), None


def _run(channel: Channel, spec: EngineSpec, engine: Engine | None, two_tower: LoadedTwoTower | None) -> None:
    models = [*([engine.runner.model] if engine else []), *([two_tower.model] if two_tower else [])]
    limit = spec.config.resolve_timeout(next(models[0].parameters()).device.type)
    pulse = Pulse()
    pulse.follow(models)
    worker = None if two_tower is None else EmbedWorker(two_tower.model, spec.config)
    if engine is not None:
        engine.warm_up()
        channel.send(frame("stats", engine.stats()))
    channel.send(frame("ready", _facts(engine, two_tower)))
    with Watch(pulse.moves, limit, functools.partial(_end_hung, threading.get_ident(), limit)):
        _serve(channel, engine, worker, pulse)


def _facts(engine: Engine | None, two_tower: LoadedTwoTower | None) -> EngineFacts:
    context_length = None if engine is None else engine.context_length
    kv_bytes = None if engine is None else engine.runner.kv.bytes_per_token
    if two_tower is None:
        return EngineFacts(context_length, kv_bytes_per_token=kv_bytes)
    calibration = Calibration(*(number.detach().cpu() for number in two_tower.model.calibration))
    return EngineFacts(context_length, calibration, two_tower.not_shared_because, kv_bytes)


def _serve(channel: Channel, engine: Engine | None, worker: EmbedWorker | None, pulse: Pulse) -> None:
    """A step of the engine and a forward of the worker take turns, until the parent hangs up (EOFError, OSError)."""

    def tell(kind: str, value: object) -> None:
        buffers = frame(kind, value)
        with pulse.waiting():  # the parent may be stopped, and the connection full
            channel.send(buffers)

    told = 0.0
    while True:
        generating = engine is not None and engine.has_work
        if engine is not None and (not generating or time.monotonic() - told > STATS_SECONDS):
            told = time.monotonic()
            tell("stats", engine.stats())
        with pulse.waiting():
            patience = 0 if generating or (worker is not None and worker.has_work) else None
            messages = _messages(channel, patience)
        if ended := [delta for message in messages for delta in _obey(message, engine, worker)]:
            tell("deltas", ended)
        deltas = engine.step() if engine is not None and engine.has_work else []
        if deltas:
            tell("deltas", deltas)
        if worker is not None and worker.has_work:
            clients_chat = engine is not None and engine.has_clients
            if embedded := worker.step(clients_chat):
                tell("embeddings", embedded)


def _messages(channel: Channel, patience: float | None) -> list[tuple[str, Any]]:
    """All that have come; waits for the first one as `patience` says."""
    messages = []
    while channel.wait(patience):
        messages.append(channel.receive())
        patience = 0
    return messages


def _obey(message: tuple[str, Any], engine: Engine | None, worker: EmbedWorker | None) -> list[TokenDelta]:
    """Does what the parent asks; gives the requests that have ended by it."""
    match message:
        case "embed", (items, batch) if worker is not None:
            worker.add(items, batch)
        case "forget", number if worker is not None:
            worker.forget(number)
        case "add", requests if engine is not None:
            return [ended for one in requests if (ended := _take(engine, one)) is not None]
        case "abort", request_id if engine is not None:
            aborted = engine.abort(request_id)
            return [] if aborted is None else [aborted]
    return []


def _take(engine: Engine, request: Request) -> TokenDelta | None:
    """Queues a request; one that can never run ends here with its error."""
    try:
        engine.add(request)
    except SiglaneError as error:
        return TokenDelta(request.request_id, finished=Finished("error", error=error))
    except Exception as error:
        logger.exception("a request could not be queued", extra=request.log_fields)
        reason = EngineError(f"the request could not be queued ({type(error).__name__})")
        return TokenDelta(request.request_id, finished=Finished("error", error=reason))
    return None


def _beat(channel: Channel, config: EngineConfig) -> None:
    """Says that this process runs at all: also while it loads, and while a step takes long."""
    with contextlib.suppress(OSError):
        while True:
            channel.send(frame("beat", None))
            time.sleep(turn_seconds(min(config.silence_limit, config.load_timeout)))


def _end_hung(thread: int, limit: float) -> None:
    logger.critical("the engine has not moved for %g seconds and ends; it hangs at %s", limit, _stack(thread))
    os._exit(HUNG)


def _end_load(channel: Channel, thread: int, limit: float) -> None:
    """Another try would hang too: the parent is told to give up."""
    logger.critical("nothing was computed or read for %g seconds of loading; it hangs at %s", limit, _stack(thread))
    message = f"the model does not load: nothing was computed or read for {limit:g} seconds; see the log, load_timeout"
    with contextlib.suppress(OSError):
        channel.send(frame("failed", EngineError(message, code="engine_start")))
    os._exit(HUNG)


def _stack(thread: int) -> str:
    stack = traceback.extract_stack(sys._current_frames()[thread])
    return " < ".join(f"{entry.filename}:{entry.lineno} {entry.name}" for entry in reversed(stack[-STACK_DEPTH:]))


def _end_with_parent() -> NoReturn:
    """The channel tells of the parent's end too, but is not looked at during a step or while the model loads."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
