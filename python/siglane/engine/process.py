"""The engine in a process of its own, watched: when it dies its requests end with an error and it is started again.

Parent and child talk over one anonymous pipe; nothing listens on a socket. The child never outlives its parent.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import multiprocessing
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Literal

from siglane.engine.child import EngineFacts, EngineSpec, run_child
from siglane.engine.embed_worker import Embedding, Item
from siglane.engine.engine import EngineStats
from siglane.errors import EngineError, SiglaneError
from siglane.types import Finished, Request, TokenDelta

logger = logging.getLogger(__name__)

State = Literal["starting", "ready", "restarting", "dead", "closed"]
OnDelta = Callable[[TokenDelta], None]

RESTARTS_ALLOWED = 5
RESTART_WINDOW_SECONDS = 300.0
CLOSE_SECONDS = 10.0
END_SECONDS = 5.0


class EngineProcess:
    """A supervised engine. `submit` and `abort` may be called from any thread and wait while the pipe is full;
    callbacks run on the one thread that empties it, so they must neither block nor call back.

    Every submitted request gets exactly one delta that is finished: by the engine, with "abort" after `abort`, or with
    "error" and `EngineError(code="engine_restarting", status=503)` when the process died under it. The future of every
    item to embed ends likewise.
    """

    def __init__(self, spec: EngineSpec, restarts_allowed: int | None = None) -> None:
        """restarts_allowed: within RESTART_WINDOW_SECONDS, one more and the engine is given up; None: a few."""
        self.spec, self._restarts_allowed = spec, restarts_allowed
        self.state: State = "starting"
        self.failure: SiglaneError | None = None
        self._context = multiprocessing.get_context("spawn")
        self._lock = threading.Lock()
        self.facts: EngineFacts | None = None  # once all is loaded
        self._pending: dict[str, OnDelta] = {}
        self._embeddings: dict[int, Future[Embedding]] = {}
        self._numbers = itertools.count()
        self._embed_sender = ThreadPoolExecutor(1, thread_name_prefix="embed-sender")  # the pipe may be full
        self._stats: EngineStats | None = None
        self._starts: list[float] = []
        self._changed = threading.Condition()
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None
        self._reader = threading.Thread(target=self._supervise, name="engine-supervisor", daemon=True)

    def start(self, wait: bool = True) -> None:
        """Starts the child; with `wait`, returns when the model is loaded. Raises what kept it from loading."""
        self._reader.start()
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.state in ("ready", "dead", "closed"))
        if self.state != "ready":
            raise self.failure or EngineError("the engine was closed before it was ready", code="engine_closed")

    def submit(self, requests: Sequence[Request], on_delta: OnDelta) -> None:
        """Hands requests over, all or none: in one message, so that the n choices of one prompt take its pixels along
        once. EngineError (503) when the engine is not ready."""
        message = pickle.dumps(("add", tuple(requests)), protocol=5)
        with self._lock:
            for request in requests:
                if request.request_id in self._pending:
                    raise ValueError(f"request id {request.request_id!r} is in use")
            if self._check_ready().context_length is None:
                raise EngineError("no model that chats is loaded", code="not_loaded")
            self._pending.update((request.request_id, on_delta) for request in requests)
            self._send(message)

    def abort(self, request_id: str) -> None:
        """Asks for the end of a request; its final delta says "abort" unless it ended before."""
        with self._lock:
            if self._pipe is not None and request_id in self._pending:
                self._send(pickle.dumps(("abort", request_id)))

    def embed(self, items: Sequence[Item]) -> list[Future[Embedding]]:
        """The embeddings to come of images and texts. Does not wait; an item whose future is cancelled takes no room in
        a forward. An error is EngineError, with status 503 when the engine is not ready or dies under it."""
        futures = {next(self._numbers): Future[Embedding]() for _ in items}
        for number, future in futures.items():
            self._embeddings[number] = future
            future.add_done_callback(functools.partial(self._embedded, number))
        self._embed_sender.submit(self._send_items, futures, items)
        return list(futures.values())

    def fail_embeddings(self, error: SiglaneError) -> None:
        """Ends every item that waits or is computed."""
        for future in list(self._embeddings.values()):
            _end(future, error)

    def stats(self) -> EngineStats | None:
        """The child's figures, at most half a second old while it works. None before it is ready."""
        return self._stats

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def close(self, drain: float = 0.0) -> None:
        """Waits up to `drain` seconds for running requests, then ends the child; what is left gets an error delta."""
        deadline = time.monotonic() + drain
        while (self._pending or self._embeddings) and self.state == "ready" and time.monotonic() < deadline:
            time.sleep(0.02)
        self._set_state("closed")
        if self._lock.acquire(timeout=CLOSE_SECONDS):  # a child that does not read makes a sender hold it
            try:
                self._ask_to_end()
            finally:
                self._lock.release()
            self._join_reader()
        if self._process is not None:
            self._process.kill()
        self._join_reader()

    def _join_reader(self) -> None:
        if self._reader.is_alive() and self._reader is not threading.current_thread():
            self._reader.join(timeout=CLOSE_SECONDS)

    def _ask_to_end(self) -> None:
        """Called with the lock held. A child that still loads its model is not listening."""
        if self._pipe is not None:
            self._send(pickle.dumps(("close", None)))
        elif self._process is not None:
            self._process.kill()

    def _check_ready(self) -> EngineFacts:
        """Called with the lock held."""
        if self.state != "ready" or self._pipe is None or self.facts is None:
            raise self._unready()
        return self.facts

    def _send(self, message: bytes) -> None:
        """Called with the lock held. A broken pipe is the reader's business: it sees the end and restarts."""
        assert self._pipe is not None
        try:
            self._pipe.send_bytes(message)
        except OSError:
            logger.warning("the engine process is gone; waiting for its restart")

    def _send_items(self, futures: dict[int, Future[Embedding]], items: Sequence[Item]) -> None:
        wanted = [(number, item) for (number, one), item in zip(futures.items(), items, strict=True) if not one.done()]
        message = pickle.dumps(("embed", wanted), protocol=5)
        try:
            with self._lock:
                if self._check_ready().calibration is None:
                    raise EngineError("no model that embeds is loaded", code="not_loaded")
                self._send(message)
        except EngineError as error:
            for future in futures.values():
                _end(future, error)

    def _embedded(self, number: int, done: Future[Embedding]) -> None:
        """Called on the thread that ends the future."""
        del self._embeddings[number]
        if done.cancelled():
            self._embed_sender.submit(self._forget, number)

    def _forget(self, number: int) -> None:
        with self._lock:
            if self._pipe is not None:
                self._send(pickle.dumps(("forget", number)))

    def _supervise(self) -> None:
        while self.state not in ("closed", "dead"):
            try:
                self._run_child()
            except Exception as error:
                logger.exception("the engine process could not be watched")
                self._give_up(EngineError(f"the engine process could not be started: {error}", code="engine_start"))
            self._after_end()

    def _run_child(self) -> None:
        """One child, from its start to its end."""
        self._starts.append(time.monotonic())
        parent_end, child_end = self._context.Pipe()
        process = self._context.Process(
            target=run_child, args=(child_end, self.spec), name="siglane-engine", daemon=True
        )
        try:
            with child_end:
                process.start()
            self._process = process
            if self.state == "closed":  # `close` may have looked for a child before there was one
                process.kill()
            self._read_until_end(parent_end)
            process.join(timeout=END_SECONDS)
            process.kill()  # one that hangs at its end would keep its memory
        finally:
            with self._lock:
                self._pipe = None
                parent_end.close()

    def _read_until_end(self, pipe: Connection) -> None:
        try:
            while True:
                kind, value = pickle.loads(pipe.recv_bytes())
                if kind == "deltas":
                    for delta in value:
                        self._deliver(delta)
                elif kind == "embeddings":
                    for number, result in value:
                        if (future := self._embeddings.get(number)) is not None:  # else its client has left
                            _end(future, result)
                elif kind == "stats":
                    self._stats = value
                elif kind == "ready":
                    with self._lock:
                        self._note_facts(value)
                        self._pipe = pipe
                        self._set_state("ready")
                        if self.state == "closed":
                            self._ask_to_end()
                elif kind == "failed":
                    self._give_up(value)
        except (EOFError, OSError):
            return

    def _note_facts(self, facts: EngineFacts) -> None:
        self.facts, reason = facts, facts.not_shared_because
        if self.spec.tagger is not None:
            place = f"loaded beside: {reason}" if reason else "the chat model's own"
            logger.info("%s tags beside the chat model; its image tower is %s", self.spec.tagger, place)

    def _after_end(self) -> None:
        """The child is gone: its requests end, and it is started again unless that happens too often."""
        with self._lock:
            if self.state not in ("closed", "dead"):
                recent = [start for start in self._starts if time.monotonic() - start < RESTART_WINDOW_SECONDS]
                if len(recent) > (RESTARTS_ALLOWED if self._restarts_allowed is None else self._restarts_allowed):
                    self._give_up(EngineError("the engine process died too often; see its log", code="engine_dead"))
                else:
                    self._set_state("restarting")
                logger.error("the engine process died (%d recent starts); state %s", len(recent), self.state)
            lost = list(self._pending)
        error = self._unready()
        for request_id in lost:
            self._deliver(TokenDelta(request_id, finished=Finished("error", error=error)))
        self.fail_embeddings(error)

    def _deliver(self, delta: TokenDelta) -> None:
        callback = self._pending.get(delta.request_id)
        if delta.finished is not None:
            self._pending.pop(delta.request_id, None)
        if callback is not None:
            try:
                callback(delta)
            except Exception:
                logger.exception("a delta's callback failed")

    def _unready(self) -> EngineError:
        if self.state in ("closed", "dead"):
            return EngineError("the engine is down", code="engine_down", status=503)
        message = "the engine is starting; try again in a few seconds"
        return EngineError(message, code="engine_restarting", status=503)

    def _give_up(self, failure: SiglaneError) -> None:
        self.failure = failure
        self._set_state("dead")

    def _set_state(self, state: State) -> None:
        """Nothing leaves "closed" or "dead", except that what is dead can be closed."""
        with self._changed:
            if self.state != "closed" and (self.state != "dead" or state == "closed"):
                self.state = state
            self._changed.notify_all()


def _end(future: Future[Embedding], result: Embedding | SiglaneError) -> None:
    """Once: what comes later, or after its client has left, changes nothing."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(result, SiglaneError):
            future.set_exception(result)
        else:
            future.set_result(result)
