"""One HTTP request from the first byte to the last, as every layer of the server sees it."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field

from prometheus_client import Gauge
from starlette.types import Scope

from siglane.server.clients import Client
from siglane.server.errors import overloaded
from siglane.server.stopwatch import Stopwatch

KEY = "siglane.context"
_CLIENT_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class InflightBytes:
    """Bytes that all requests together may hold, from socket to engine."""

    def __init__(self, limit: int, gauge: Gauge) -> None:
        self.limit, self.used, self._gauge = limit, 0, gauge

    def change(self, count: int) -> None:
        if count > 0 and self.used + count > self.limit:
            raise overloaded("the server holds too many images at the moment; try again")
        self.used += count
        self._gauge.set(self.used)


class InflightShare:
    """A part of them that some requests may hold together, so that there is room for the others."""

    def __init__(self, whole: InflightBytes, limit: int) -> None:
        self.whole, self.limit, self.used = whole, limit, 0

    def change(self, count: int) -> None:
        if count > 0 and self.used + count > self.limit:
            raise overloaded("the batches hold too many images at the moment; try again")
        self.whole.change(count)
        self.used += count


@dataclass(slots=True)
class ByteLease:
    """What one request holds of them."""

    inflight: InflightBytes | InflightShare
    held: int = 0

    def take(self, count: int) -> None:
        """Raises EngineError (503) when all requests together would hold too much."""
        self.inflight.change(count)
        self.held += count

    def give(self, count: int) -> None:
        self.inflight.change(-count)
        self.held -= count

    def close(self) -> None:
        self.give(self.held)


@dataclass(slots=True)
class RequestContext:
    """status: of the response, once it has begun; finished: its last byte was handed over.

    cancelled: the client left before; failed: the error that ended the answer, for log and metrics; client: whose key
    the request came with; answer_id: the id in its answer; work: what answers it; aborted: by its client (`/abort`);
    timings: whether a header asks for them; watch: its stages. batch: nobody waits for the answer, so that it yields to
    others; turn: to be prepared, where not all may be at a time; place: among those that go to the engine one after the
    other; admit: called when all is prepared, raises what keeps it from the engine.
    """

    request_id: str
    lease: ByteLease
    began: float = field(default_factory=time.monotonic)
    status: int | None = None
    finished: bool = False
    cancelled: bool = False
    failed: str | None = None
    batch: bool = False
    turn: AbstractAsyncContextManager[object] = field(default_factory=nullcontext)
    place: AbstractAsyncContextManager[object] = field(default_factory=nullcontext)
    admit: Callable[[], None] = field(default=lambda: None)
    client: Client = field(default_factory=Client)
    answer_id: str | None = None
    work: asyncio.Future[None] | None = None
    aborted: bool = False
    timings: bool = False
    watch: Stopwatch = field(default_factory=Stopwatch)

    @property
    def owner(self) -> str:
        return self.client.owner

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


def request_id_of(scope: Scope) -> str:
    """The client's x-request-id when it is harmless, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _CLIENT_ID.fullmatch(value):
            return str(value, "ascii")
    return secrets.token_hex(16)


def context_of(scope: Scope) -> RequestContext:
    context = scope[KEY]
    assert isinstance(context, RequestContext)
    return context
