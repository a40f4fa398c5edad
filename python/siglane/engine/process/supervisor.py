"""The engine in a process of its own, watched: when it dies or hangs its requests end with an error and it is started
again.

Parent and child talk over one anonymous pair of sockets (`wire.py`); nothing listens. The child never outlives its
parent.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import multiprocessing
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from typing import Literal

from siglane.engine.engine import EngineStats
from siglane.engine.process.child import EngineSpec, run_child
from siglane.engine.process.children import child_context, how_it_ended
from siglane.engine.process.embed_worker import Embedding, Item
from siglane.engine.process.pulse import Watch
from siglane.engine.process.wire import Channel, EngineFacts, frame
from siglane.errors import EngineError, EngineLost, SiglaneError
from siglane.types import Finished, Request, TokenDelta

logger = logging.getLogger(__name__)

State = Literal["starting", "ready", "restarting", "dead", "closed"]
OnDelta = Callable[[TokenDelta], None]

RESTARTS_ALLOWED = 5
RESTART_WINDOW_SECONDS = 300.0
CLOSE_SECONDS = 2.0  # for the last step, which nobody waits for any more
END_SECONDS = 5.0


class EngineProcess:
    """A supervised engine. `submit` and `abort` may be called from any thread and wait while the channel is full;
    callbacks run on the one thread that empties it, so they must neither block nor call back.

    Every submitted request gets exactly one delta that is finished: by the engine, with "abort" after `abort`, or with
    "error" and `EngineLost(code="engine_restarting", status=503)` when the process died or hung under it. The future
    of every item to embed ends likewise.

    prepare: what the child calls first of all, to set up its log. It must be picklable: with `spec` it is all that
    reaches the child by pickle, before any client does.
    """

    def __init__(
        self, spec: EngineSpec, restarts_allowed: int | None = None, *, prepare: Callable[[], None] | None = None
    ) -> None:
        """restarts_allowed: within RESTART_WINDOW_SECONDS, one more and the engine is given up; None: a few."""
        self.spec, self._restarts_allowed, self._prepare = spec, restarts_allowed, prepare
        self.state: State = "starting"
        self.failure: SiglaneError | None = None
        self._context = child_context()
        self._lock = threading.Lock()
        self.facts: EngineFacts | None = None  # once all is loaded
        self._pending: dict[str, OnDelta] = {}
        self._embeddings: dict[int, Future[Embedding]] = {}
        self._numbers = itertools.count()
        self._embed_sender = ThreadPoolExecutor(1, thread_name_prefix="embed-sender")  # the channel may be full
        self._stats: EngineStats | None = None
        self._starts: list[float] = []
        self._life = 0  # children so far
        self._silent = False  # the last child was killed because it gave no sign of life
        self._changed = threading.Condition()
        self._process: multiprocessing.process.BaseProcess | None = None
        self._channel: Channel | None = None
        self._reader = threading.Thread(target=self._supervise, name="engine-supervisor", daemon=True)

    def start(self, wait: bool = True) -> None:
        """Starts the child; with `wait`, returns when the model is loaded. Raises what kept it from loading."""
        self._reader.start()
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Returns when the model is loaded. Raises what keeps it from loading."""
        with self._changed:
            self._changed.wait_for(lambda: self.state in ("ready", "dead", "closed"))
        if self.state != "ready":
            raise self.failure or EngineError("the engine was closed before it was ready", code="engine_closed")

    def wait_end(self) -> SiglaneError | None:
        """Returns when the engine will not come back: why, None when it was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self.state in ("dead", "closed"))
        return self.failure

    def submit(self, requests: Sequence[Request], on_delta: OnDelta) -> None:
        """Hands requests over, all or none: in one message, so that the n choices of one prompt take its pixels along
        once. EngineError (503) when the engine is not ready."""
        message = frame("add", tuple(requests))
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
            if self._channel is not None and request_id in self._pending:
                self._send(frame("abort", request_id))

    def embed(self, items: Sequence[Item], batch: bool = False) -> list[Future[Embedding]]:
        """The embeddings to come of images and texts, which take turns with those of other calls, and yield to them
        where they are a batch's. Does not wait; an item whose future is cancelled takes no room in a forward. An error
        is EngineError, with status 503 when the engine is not ready or dies under it."""
        futures = {next(self._numbers): Future[Embedding]() for _ in items}
        for number, future in futures.items():
            self._embeddings[number] = future
            future.add_done_callback(functools.partial(self._embedded, number))
        self._embed_sender.submit(self._send_items, futures, items, batch)
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
        if self._channel is not None:
            with contextlib.suppress(OSError):
                self._channel.hang_up()
            self._join_reader()
        if self._process is not None:  # one that loads does not listen, one that hangs does not either
            self._process.kill()
        self._join_reader()

    def _join_reader(self) -> None:
        if self._reader.is_alive() and self._reader is not threading.current_thread():
            self._reader.join(timeout=CLOSE_SECONDS)

    def _check_ready(self) -> EngineFacts:
        """Called with the lock held."""
        if self.state != "ready" or self._channel is None or self.facts is None:
            raise self._unready()
        return self.facts

    def _send(self, message: list[memoryview]) -> None:
        """Called with the lock held. A broken connection is the reader's business: it sees the end and restarts."""
        assert self._channel is not None
        try:
            self._channel.send(message)
        except OSError:
            logger.warning("the engine process is gone; waiting for its restart")

    def _send_items(self, futures: dict[int, Future[Embedding]], items: Sequence[Item], batch: bool) -> None:
        wanted = [(number, item) for (number, one), item in zip(futures.items(), items, strict=True) if not one.done()]
        try:
            message = frame("embed", (wanted, batch))
            with self._lock:
                if self._check_ready().calibration is None:
                    raise EngineError("no model that embeds is loaded", code="not_loaded")
                self._send(message)
        except Exception as error:
            for future in futures.values():
                _end(future, error)

    def _embedded(self, number: int, done: Future[Embedding]) -> None:
        """Called on the thread that ends the future."""
        del self._embeddings[number]
        if done.cancelled():
            self._embed_sender.submit(self._forget, number)

    def _forget(self, number: int) -> None:
        with self._lock:
            if self._channel is not None:
                self._send(frame("forget", number))

    def _supervise(self) -> None:
        # what this thread starts inherits it: a signal to the whole group must not end the children's server first
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
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
        self._silent, self._life = False, self._life + 1
        parent_end, child_end = socket.socketpair()
        channel = Channel(parent_end)
        arguments = (child_end, self.spec, self._prepare)
        process = self._context.Process(target=run_child, args=arguments, name="siglane-engine", daemon=True)
        try:
            with child_end:
                process.start()
            self._process = process
            if self.state == "closed":  # `close` may have looked for a child before there was one
                process.kill()
            with Watch(lambda: channel.received, self.spec.config.load_timeout, self._end_silent) as watch:
                self._read_until_end(channel, watch)
            process.join(timeout=END_SECONDS)
            process.kill()  # one that hangs at its end would keep its memory
        finally:
            with self._lock:
                self._channel = None
                channel.close()

    def _end_silent(self) -> None:
        """Of a process that has never been ready another one would not be either."""
        self._silent = True
        if self.facts is None:
            limit = f"{self.spec.config.load_timeout:g} seconds"
            message = f"the engine process gave no sign of life for {limit} of loading and was ended; see load_timeout"
            self._give_up(EngineError(message, code="engine_start"))
        assert self._process is not None
        self._process.kill()

    def _read_until_end(self, channel: Channel, watch: Watch) -> None:
        try:
            while True:
                kind, value = channel.receive()
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
                    watch.stillness.limit = self.spec.config.silence_limit
                    self._note_ready(channel, value)
                elif kind == "failed":
                    self._give_up(value)
        except (EOFError, OSError):
            return

    def _note_ready(self, channel: Channel, facts: EngineFacts) -> None:
        with self._lock:
            self._note_facts(facts)
            self._channel = channel
            self._set_state("ready")
            if self.state == "closed":
                channel.hang_up()

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
                how = "after a time without a sign of life" if self._silent else how_it_ended(self._process)
                if len(recent) > (RESTARTS_ALLOWED if self._restarts_allowed is None else self._restarts_allowed):
                    message = f"the engine process died {len(recent)} times in {RESTART_WINDOW_SECONDS:g} seconds"
                    self._give_up(EngineError(f"{message}, the last time {how}; see the log", code="engine_dead"))
                else:
                    self._set_state("restarting")
                    logger.error("the engine process died, %s; it is started again", how)
            lost = list(self._pending)
            clients = len(set(map(id, self._pending.values()))) + bool(self._embeddings)
        error = EngineLost(self._unready(), life=self._life, clients=clients)
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


def _end(future: Future[Embedding], result: Embedding | Exception) -> None:
    """Once: what comes later, or after its client has left, changes nothing."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
