"""What happens to a request before it reaches its route. Plain ASGI: wrapping responses would hide disconnects.

Outermost first: `UnderRoot` (a proxy's path), `Observe` (id, log, metrics, traces, last resort), `Authenticate`,
`Intake` (queue, keys' and body limits, disconnects), which guards only the routes that read a body.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import Callable, Iterator

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from siglane.errors import EngineError, UserError
from siglane.server.clients import Clients
from siglane.server.context import KEY, ByteLease, InflightBytes, RequestContext, context_of, request_id_of
from siglane.server.errors import aborted, as_api_error, error_response, overloaded
from siglane.server.metrics import Metrics, Outcome
from siglane.server.running import Running
from siglane.server.traces import Traces

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"})


FREE_BYTES = 1 << 20  # of a body that is read however full the server is
TIMINGS = b"x-siglane-timings"  # its value 1 asks for `siglane.timings`


class UnderRoot:
    """Takes the path under which a proxy shows the server from those that begin with it; a proxy may have done so."""

    def __init__(self, app: ASGIApp, root: str) -> None:
        self.app, self.root = app, root

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (scope["path"] + "/").startswith(f"{self.root}/"):
            scope = {**scope, "path": scope["path"].removeprefix(self.root) or "/"}
        await self.app(scope, receive, send)


class Observe:
    """Gives every request an id, a log line and a place in metrics and traces; answers what nobody else has caught."""

    def __init__(self, app: ASGIApp, metrics: Metrics, inflight: InflightBytes, traces: Traces | None = None) -> None:
        self.app, self.metrics, self.inflight, self.traces = app, metrics, inflight, traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        timings = (TIMINGS, b"1") in scope["headers"]
        context = RequestContext(request_id_of(scope), ByteLease(self.inflight), timings=timings)
        scope[KEY] = context
        send = _noting(context, send)
        try:
            await self.app(scope, receive, send)
        except asyncio.CancelledError:
            if context.status is None:  # cancelled by the end of the drain, not by its client
                await error_response(shutting_down())(scope, receive, send)
            raise
        except Exception as error:
            context.failed = as_api_error(error).code
            logger.exception("a request failed", extra={"request_id": context.request_id})
            if context.status is not None:
                raise  # the connection is closed, so that a cut answer cannot be taken for a whole one
            await error_response(as_api_error(error))(scope, receive, send)
        finally:
            context.lease.close()
            self._note(scope, context)

    def _note(self, scope: Scope, context: RequestContext) -> None:
        route = getattr(scope.get("route"), "path", "other")
        status = 499 if context.cancelled or context.status is None else context.status
        self.metrics.count_http(route, scope["method"], status)
        ending = "left by its client" if context.cancelled else context.failed or str(status)
        milliseconds = round(context.seconds * 1000)
        extra = {
            "request_id": context.request_id,
            "method": scope["method"],
            "route": route,
            "status": status,
            "milliseconds": milliseconds,
            "code": context.failed,
            "key": context.client.name or None,
        }
        if self.traces is not None and route not in OPEN_PATHS:
            self.traces.record(scope, context, route, status)
        level = logging.DEBUG if route in OPEN_PATHS else logging.INFO
        logger.log(level, "%s %s: %s in %d ms", scope["method"], route, ending, milliseconds, extra=extra)


def _noting(context: RequestContext, send: Send) -> Send:
    async def noting(message: Message) -> None:
        if message["type"] == "http.response.start":
            context.status = message["status"]
            request_id = (b"x-request-id", context.request_id.encode())
            message = {**message, "headers": [*message.get("headers", ()), request_id]}
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            context.finished = True
        await send(message)

    return noting


class Authenticate:
    """Asks for the API key everywhere but on open paths: those that probes use, and the page that has a field for it.

    Decides on the path that is routed (`scope["path"]`), never on one rebuilt from headers.
    """

    def __init__(self, app: ASGIApp, clients: Clients, open_paths: frozenset[str]) -> None:
        self.app, self._open_paths = app, open_paths
        self._everybody = clients.everybody
        self._clients = {b"Bearer " + key.encode(): client for key, client in clients.by_key.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open_paths or self._allowed(scope):
            await self.app(scope, receive, send)
            return
        error = UserError("a valid API key is needed: 'Authorization: Bearer KEY'", code="invalid_api_key", status=401)
        context_of(scope).failed = error.code
        await error_response(error)(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        """Notes whose key it is. All keys are compared, so that the time tells nothing."""
        if not self._clients:
            context_of(scope).client = self._everybody
            return True
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        found = [one for key, one in self._clients.items() if len(sent) == 1 and hmac.compare_digest(sent[0], key)]
        if found:
            context_of(scope).client = found[0]
        return bool(found)


class Gate:
    """Lets at most `limit` requests in, and none while `refuse` gives a reason."""

    def __init__(self, limit: int, refuse: Callable[[], EngineError | None], metrics: Metrics) -> None:
        self.limit, self.refuse, self.metrics = limit, refuse, metrics
        self.active = 0

    def check(self) -> None:
        """Raises EngineError (503) when nobody is let in."""
        refusal = self.refuse()
        if refusal is not None:
            raise refusal
        if self.active >= self.limit:
            raise overloaded(f"{self.limit} requests are waiting already; try again")

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        self.check()
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        self.active += change
        self.metrics.in_flight.set(self.active)


class Intake:
    """Reads the whole body within its limits, then runs the route, and cancels it when the client leaves.

    The gate and the limits of the client's key are asked before the body, so that a refusal is cheap, and entered after
    it, so that clients who never send theirs take nobody's place. free: paths that are open however full it is.
    """

    def __init__(
        self,
        app: ASGIApp,
        paths: frozenset[str],
        free: frozenset[str],
        gate: Gate,
        running: Running,
        max_bytes: int,
        timeout: float,
    ) -> None:
        self.app, self.paths, self.free, self.gate, self.running = app, paths, free, gate, running
        self.max_bytes, self.timeout = max_bytes, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        free = scope["type"] == "http" and scope["path"] in self.free
        if scope["type"] != "http" or scope["method"] != "POST" or not (free or scope["path"] in self.paths):
            await self.app(scope, receive, send)
            return
        context = context_of(scope)
        try:
            if not free:
                self.gate.check()
                context.client.check()
            most = min(self.max_bytes, FREE_BYTES) if free else self.max_bytes
            self._check_headers(dict(scope["headers"]), most)
            body = await self._read(receive, context.lease, most)
            if body is None:
                context.cancelled = True
                return
            with contextlib.nullcontext() if free else self._entered(context):
                await self._run(body, context, scope, receive, send)
        except (UserError, EngineError) as error:
            context.failed = error.code
            await error_response(error)(scope, receive, send)
        finally:
            if not free:
                self.gate.metrics.count_request(_outcome(context), context.seconds, context.client.name)

    @contextlib.contextmanager
    def _entered(self, context: RequestContext) -> Iterator[None]:
        with self.gate.entered(), context.client.entered(), self.running.noted(context):
            yield

    def _check_headers(self, headers: dict[bytes, bytes], most: int) -> None:
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise UserError("compressed bodies are not accepted", code="unsupported_content_encoding", status=415)
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            raise UserError("the content type must be application/json", code="unsupported_media_type", status=415)
        if int(headers.get(b"content-length", b"0")) > most:
            raise _too_large(most)

    async def _read(self, receive: Receive, lease: ByteLease, most: int) -> bytes | None:
        """The body; None when the client left before its end."""
        try:
            async with asyncio.timeout(self.timeout):
                return await _read_all(receive, lease, most)
        except TimeoutError:
            message = f"the request body did not arrive within {self.timeout:g} seconds"
            raise UserError(message, code="request_timeout", status=408) from None

    async def _run(self, body: bytes, context: RequestContext, scope: Scope, receive: Receive, send: Send) -> None:
        context.work = work = asyncio.ensure_future(self.app(scope, _replay(body), send))
        # with the body read, the only thing left to receive is that the client has gone
        watch = asyncio.ensure_future(receive())
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not context.finished:
                context.cancelled = True
                work.cancel()
            await asyncio.wait({work})
        finally:
            watch.cancel()
            work.cancel()
        if not work.cancelled():
            work.result()
        elif context.aborted and context.status is None:
            raise aborted()


async def _read_all(receive: Receive, lease: ByteLease, most: int) -> bytes | None:
    chunks: list[bytes] = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunk = message.get("body", b"")
        if lease.held + len(chunk) > most:
            raise _too_large(most)
        lease.take(len(chunk))
        chunks.append(chunk)
        more = message.get("more_body", False)
    return b"".join(chunks)


def _too_large(most: int) -> UserError:
    return UserError(f"the body is larger than {most} bytes", code="request_too_large", status=413)


def _outcome(context: RequestContext) -> Outcome:
    if context.cancelled or context.aborted:
        return "cancelled"
    if context.status in (429, 503):
        return "rejected"
    if context.status is None or context.status >= 500:
        return "server_error"
    if context.status >= 400:
        return "client_error"
    return "server_error" if context.failed else "ok"


def _replay(body: bytes) -> Receive:
    """A receive that gives the body once and then waits for ever."""
    parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        if parts:
            return parts.pop()
        await asyncio.Event().wait()
        raise AssertionError

    return replay


def shutting_down() -> EngineError:
    return overloaded("the server is shutting down; try again", code="server_shutting_down")
