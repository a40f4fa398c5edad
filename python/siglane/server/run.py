"""Running the server: port and model are checked before anything heavy is loaded; SIGTERM lets requests finish."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import functools
import logging
import re
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import h11
import orjson
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from siglane.errors import SiglaneError, UserError
from siglane.server import logs
from siglane.server.errors import error_body
from siglane.settings.server import ServerConfig
from siglane.tiling.rule import CHECKPOINT_LIMITS, ImageBudget
from siglane.weights.demo import FOLDERS, open_model

if TYPE_CHECKING:
    from siglane.config.two_tower import TwoTowerConfig
    from siglane.engine.child import EngineSpec
    from siglane.engine.process import EngineProcess
    from siglane.server.embedding import EmbeddingState
    from siglane.server.state import ModelState, ServerState
    from siglane.text.tokens import TextTokens
    from siglane.weights.hub import Checkpoint

logger = logging.getLogger(__name__)

BACKLOG = 4096
FILES = 65536  # one per connection; the usual limit of 1024 would refuse clients long before the queue does
LINGER_SECONDS = 1.0  # for a client to read that what it sends is not HTTP, before its connection is closed
CLOSING_SECONDS = 3  # for the last bytes of failed answers to leave
REPOSITORY_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def preflight(config: ServerConfig, model: str) -> socket.socket:
    """The listening socket. UserError in well under a second when the port or the model cannot be had.

    Call it before importing anything that loads torch.
    """
    check_model_exists(model, "model")
    if config.tagger is not None and config.tagger not in FOLDERS:
        check_model_exists(config.tagger, "tagger")
    root = config.allowed_local_media_path
    if root is not None and not Path(root).is_dir():
        raise UserError(f"allowed_local_media_path {root!r} is not a folder", code="bad_option")
    return listen(config.host, config.port)


def check_model_exists(model: str, param: str) -> None:
    """UserError for a folder that is none, or holds no model."""
    folder = Path(model).expanduser()
    if not folder.is_dir() and (folder.is_absolute() or folder.exists() or not REPOSITORY_ID.fullmatch(model)):
        message = f"there is no folder {model!r}; give a model's folder or its hub id (owner/name)"
        raise UserError(message, code="model_not_found", param=param)
    if folder.is_dir() and not (folder / "config.json").is_file():
        message = f"{model} holds no config.json; give the folder of a model"
        raise UserError(message, code="model_not_found", param=param)


def listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's delay off only for sockets that say they are TCP: without it every answer waits 40 ms
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            message = f"port {port} of {host} is in use; choose another one with --port"
            raise UserError(message, code="port_in_use") from error
        message = f"cannot listen on {host} port {port}: {error.strerror or error}"
        raise UserError(message, code="cannot_listen") from error
    return listener


def serve(
    config: ServerConfig,
    spec: EngineSpec,
    listener: socket.socket | None = None,
    budget: ImageBudget = CHECKPOINT_LIMITS,
) -> int:
    """Serves until a signal, and returns the exit code: 0 after SIGTERM or Ctrl-C.

    listener: from `preflight`, when the caller has checked already; budget: the ceiling of the clients'. Raises
    UserError for a port, a model or a budget that cannot be used, EngineError when the engine cannot be started.
    """
    listener = listener or preflight(config, spec.model)
    with contextlib.closing(listener):
        logs.configure(config.log_format, config.log_level)
        _raise_file_limit()

        # torch and transformers are loaded here, after everything that can fail at once
        from siglane.families.two_tower import has_both_towers
        from siglane.server.app import create_app
        from siglane.weights.hub import open_checkpoint

        checkpoint = open_checkpoint(spec.model, spec.revision)  # downloads it, where the engine's process will look
        behind = embedding if has_both_towers(checkpoint) else chatting
        with behind(config, spec, checkpoint, budget) as state:
            server = Server(uvicorn_config(create_app(state), config), state)
            server.stop_when_engine_fails()
            host, port = listener.getsockname()[:2]
            logger.info("serving %s on http://%s:%d/v1", state.name, f"[{host}]" if ":" in host else host, port)
            server.run([listener])
            state.close()
    if server.failure is not None:
        raise server.failure
    return 0


@contextlib.contextmanager
def chatting(
    config: ServerConfig, spec: EngineSpec, checkpoint: Checkpoint, budget: ImageBudget
) -> Iterator[ServerState]:
    """A vision-language model with its engine in a process of its own, which loads while the server starts."""
    from siglane.engine.process import EngineProcess
    from siglane.families.processor import load_processor
    from siglane.server.state import ServerState

    tagger = None if config.tagger is None else read_tagger(config.tagger)
    engine = EngineProcess(dataclasses.replace(spec, tagger=config.tagger))
    engine.start(wait=False)
    try:
        state = ServerState(config, spec.model, load_processor(checkpoint), engine, budget)
        if tagger is not None:
            state.company = (tagging(state, *tagger, engine),)
        yield state
    finally:
        engine.close()


def read_tagger(model: str) -> tuple[str, TwoTowerConfig, TextTokens]:
    """The SigLIP beside a chat model: its name, facts and tokenizer. Downloads it, where the engine's process will
    look. UserError when it has no text tower."""
    from siglane.families.two_tower import read_two_tower

    return model, *read_two_tower(open_model(model))


def tagging(
    chat: ServerState, model: str, facts: TwoTowerConfig, tokens: TextTokens, engine: EngineProcess
) -> EmbeddingState:
    """Budgets of images are the chat model's; the SigLIP reads pictures as its checkpoint says."""
    from siglane.server.embedder import EngineEmbedder
    from siglane.server.embedding import EmbeddingState

    return EmbeddingState(chat.config, model, facts, tokens, EngineEmbedder(engine), beside=chat)


@contextlib.contextmanager
def embedding(
    config: ServerConfig, spec: EngineSpec, checkpoint: Checkpoint, budget: ImageBudget
) -> Iterator[EmbeddingState]:
    """A SigLIP with both towers on a thread of its own, which loads them while the server starts."""
    from siglane.families.two_tower import read_two_tower
    from siglane.server.embedder import Embedder
    from siglane.server.embedding import EmbeddingState

    if config.tagger is not None:
        message = f"{spec.model} is a SigLIP itself; leave --tagger out"
        raise UserError(message, code="bad_option", param="tagger")
    facts, tokens = read_two_tower(checkpoint)
    embedder = Embedder(checkpoint, spec.config)
    state = EmbeddingState(config, spec.model, facts, tokens, embedder, budget)
    embedder.start()
    try:
        yield state
    finally:
        embedder.close()


def uvicorn_config(app: Any, config: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=functools.partial(PatientProtocol, stall_timeout=config.stall_timeout),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,  # it would write queries and client-chosen paths; middleware.Observe has its own line
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=config.idle_timeout,
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )


class Server(uvicorn.Server):
    """uvicorn with a drain: the first signal stops admission and lets requests finish, the second ends them now."""

    def __init__(self, config: uvicorn.Config, state: ModelState) -> None:
        super().__init__(config)
        self._state = state
        self._deadline: float | None = None
        self.failure: SiglaneError | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # not uvicorn's own: it raises the signal again at the end, and the exit code of a clean stop is 0
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self.handle_exit) for number in signals]
        try:
            yield
        finally:
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._deadline is None:
            self._state.draining = True
            self._deadline = now + self._state.config.drain_timeout
        else:
            self._deadline = now

    def drain(self) -> None:
        """What the first SIGTERM does."""
        self.handle_exit(signal.SIGTERM, None)

    async def on_tick(self, counter: int) -> bool:
        if self._deadline is not None and not self.should_exit:
            late = time.monotonic() >= self._deadline
            if late:
                self._state.fail_all()
            if late or not self._busy:
                self.should_exit = True
        return await super().on_tick(counter)

    @property
    def _busy(self) -> bool:
        return bool(self.server_state.tasks)

    def stop_when_engine_fails(self) -> None:
        """A model that cannot be loaded ends the server with the reason, instead of a server that is never ready."""

        def watch() -> None:
            try:
                self._state.engine.wait_ready()
                logger.info("ready")
            except SiglaneError as error:
                if self._deadline is None:
                    self.failure = error
                    self.should_exit = True

        threading.Thread(target=watch, name="engine-watch", daemon=True).start()


class PatientProtocol(H11Protocol):
    """HTTP/1.1 with deadlines for clients that connect and do not go on, or do not read what they asked for."""

    def __init__(self, *args: Any, stall_timeout: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stall_timeout = stall_timeout
        self._idle_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_idle()

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            super().data_received(data)
            self._watch_idle()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._idle_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self._stall_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP gets the body that every other failure has; behind an answer that has begun, nothing."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if not (answering and self.cycle.response_started):
            body = orjson.dumps(error_body(UserError(msg, code="invalid_http")))
            head = "HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-type: application/json"
            self.transport.write(f"{head}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        if answering:
            self.transport.close()
            return
        self._refused = True  # the rest is read and forgotten: closed over it, the connection would lose the answer too
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _watch_idle(self) -> None:
        """The client has one idle timeout for its next whole header (and for a refused body's end), however it
        dribbles; while a request is being answered it has none here."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        elif not answering and self._idle_timer is None and self.conn.our_state is not h11.ERROR:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self.transport.close)


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
