"""HTTP by uvicorn: its configuration, a drain that lets requests finish, and patience that has an end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import h11
import orjson
import uvicorn
from h11._connection import DEFAULT_MAX_INCOMPLETE_EVENT_SIZE
from uvicorn.protocols.http.h11_impl import H11Protocol

from siglane.errors import EngineError, SiglaneError, UserError
from siglane.server.errors import error_body, overloaded
from siglane.server.strict import StrictConnection
from siglane.settings.server import ServerConfig

if TYPE_CHECKING:
    from siglane.server.served import Served

logger = logging.getLogger(__name__)

BACKLOG = 4096
CLOSING_SECONDS = 3  # for the last bytes of failed answers to leave
SPARE_FILES = 256  # for what requests open (pictures, downloads, pipes), or half of all where there are few
TOLD = 1 / 8  # of the connections that are served so many may wait beside them until their client has read why not
OUT_OF_FILES = "socket.accept() out of system resource"  # asyncio's


def most_connections() -> int:
    """How many connections leave this process the files that requests need."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return files - min(SPARE_FILES, files // 2) if files != resource.RLIM_INFINITY else sys.maxsize


def uvicorn_config(app: Any, config: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=functools.partial(  # type: ignore[arg-type]
            PatientProtocol, stall_timeout=config.stall_timeout, most=most_connections()
        ),
        ws="none",
        lifespan="off" if config.data_dir is None else "on",  # of what runs beside the requests
        log_config=None,
        log_level="warning",
        access_log=False,  # it would write queries and client-chosen paths; middleware.Observe has its own line
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=config.idle_timeout,
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )


class Server(uvicorn.Server):
    """uvicorn with a drain: the first signal stops admission and lets requests finish, the second ends them now."""

    def __init__(self, config: uvicorn.Config, served: Served) -> None:
        super().__init__(config)
        self._served = served
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
            self._served.draining = True
            self._deadline = now + self._served.config.drain_timeout
        else:
            self._deadline = now

    def drain(self) -> None:
        """What the first SIGTERM does."""
        self.handle_exit(signal.SIGTERM, None)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(_AcceptLog())
        await super().startup(sockets=sockets)

    async def on_tick(self, counter: int) -> bool:
        if self._deadline is not None and not self.should_exit:
            late = time.monotonic() >= self._deadline
            if late:
                self._served.fail_all()
            if late or not self._busy:
                self.should_exit = True
        return await super().on_tick(counter)

    @property
    def _busy(self) -> bool:
        return bool(self.server_state.tasks)

    def stop_when_engine_fails(self) -> None:
        """A model that cannot be loaded, or an engine that dies again and again, ends the server with the reason: a
        supervisor acts on that, and not on a server that is never ready."""

        def watch() -> None:
            engine = self._served.engine
            with contextlib.suppress(SiglaneError):
                engine.wait_ready()
                logger.info("ready")
            failure = engine.wait_end()
            if failure is not None and self._deadline is None:
                self.failure = failure
                self.should_exit = True

        threading.Thread(target=watch, name="engine-watch", daemon=True).start()


class _AcceptLog:
    """What an event loop calls for exceptions of its own. A process without files for one more connection gets
    thousands a second, with a traceback each: it is told once a second, in a line."""

    def __init__(self) -> None:
        self._next = -math.inf

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if context.get("message") != OUT_OF_FILES:
            loop.default_exception_handler(context)
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + 1
            logger.error("no files are left for more connections; see `ulimit -n`")


class _Transport:
    """A connection's transport whose `close` is the protocol's to decide."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self._transport, self.close = transport, close

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class PatientProtocol(H11Protocol):
    """HTTP/1.1 with deadlines for clients that connect and do not go on, or do not read what they asked for, and
    patience with those that are refused while they send."""

    def __init__(self, *args: Any, stall_timeout: float, most: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._most = most
        self.conn = StrictConnection(DEFAULT_MAX_INCOMPLETE_EVENT_SIZE)
        self._stall_timeout = stall_timeout
        self._idle_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._socket = transport
        self.transport = cast(asyncio.Transport, _Transport(transport, self._close))
        self._watch_idle()
        if len(self.connections) > self._most:
            self._refuse_one_more()

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
        self._stall_timer = self.loop.call_later(self._stall_timeout, self._socket.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP gets the body that every other failure has; behind an answer that has begun, nothing."""
        if self._answering:
            if self.cycle.response_started:
                self._socket.close()
                return
            self.cycle.disconnected = True  # whoever waits for the rest of the body waits no longer
            self.cycle.message_event.set()
        self._say("400 Bad Request", UserError(msg, code="invalid_http"))

    def _refuse_one_more(self) -> None:
        """Before it has asked anything. Those that come in thousands are not told why: each would hold a file."""
        if len(self.connections) > self._most * (1 + TOLD):
            self._socket.abort()
            return
        message = "the server has as many connections as it has files for; try again, or open fewer"
        self._say("503 Service Unavailable\r\nretry-after: 1", overloaded(message))

    def _say(self, status: str, error: UserError | EngineError) -> None:
        body = orjson.dumps(error_body(error))
        head = f"HTTP/1.1 {status}\r\nconnection: close\r\ncontent-type: application/json"
        self._socket.write(f"{head}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        self._linger()

    def _close(self) -> None:
        """Once; a client that has its answer before it has sent everything gets the time to read it."""
        if self.conn.their_state is h11.SEND_BODY and not self._refused:
            self._linger()
        else:
            self._socket.close()

    def _linger(self) -> None:
        """The rest is read and forgotten: closed over it, the connection would lose the answer too."""
        self._refused = True
        self.flow.resume_reading()
        try:
            if self._socket.can_write_eof():
                self._socket.write_eof()
        except OSError:  # its client has left
            self._socket.abort()
        self._watch_idle()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete and not self._refused

    def _watch_idle(self) -> None:
        """The client has one idle timeout for its next whole header (and for a refused body's end), however it
        dribbles; while a request is being answered it has none here."""
        if self._answering and self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        elif not self._answering and self._idle_timer is None and self.conn.our_state is not h11.ERROR:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._socket.close)
