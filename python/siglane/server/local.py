"""The API for a batch in this process: bodies in and out, with the checks, limits and errors that clients get."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractAsyncContextManager, closing, contextmanager, nullcontext
from typing import Any

import orjson

from siglane.batch.form import Answer
from siglane.batch.pool import EngineDied
from siglane.batch.row import CHAT, CLASSIFY, COMPLETIONS, DECISIONS, EMBEDDINGS, OF_CHAT, PAIRS, SCORE, SYSTEMONE
from siglane.errors import EngineLost, UserError
from siglane.server.chat import complete
from siglane.server.clients import Client
from siglane.server.completions.complete import complete_texts
from siglane.server.completions.protocol import CompletionRequest
from siglane.server.context import ByteLease, InflightShare, RequestContext
from siglane.server.decisions.decide import decide, decide_system_one
from siglane.server.decisions.protocol import DecisionRequest
from siglane.server.decisions.score import ScoreRequest, score
from siglane.server.decisions.system_one import SystemOneRequest
from siglane.server.embedding.embed import classify, embed, score_pairs
from siglane.server.embedding.pairs import PairsRequest
from siglane.server.embedding.protocol import ClassificationRequest, EmbeddingRequest
from siglane.server.errors import RateLimited, as_api_error, error_body, overloaded, validated
from siglane.server.protocol import ChatCompletionRequest, ignored_fields
from siglane.server.served import Served
from siglane.server.stored.deaths import DeathBudget

logger = logging.getLogger(__name__)

UNREADY = ("engine_restarting", "engine_starting", "engine_rests")
DOWN = "engine_down"
FULL = "server_overloaded"
PATIENCE = 0.05  # seconds between tries while the engine starts, or others hold all the memory
LONGEST_WAIT = 1.0  # seconds between tries while a key has had its share, or the engine has died too often
PREPARED = 8  # rows beside the running ones, so that the engine never waits for the next
STRAGGLER_SECONDS = 2.0  # that a row which is ready waits for those before it

# how a body is read and answered
ASKED: Mapping[str, tuple[Any, Any]] = {
    CHAT: (ChatCompletionRequest, complete),
    COMPLETIONS: (CompletionRequest, complete_texts),
    DECISIONS: (DecisionRequest, decide),
    SYSTEMONE: (SystemOneRequest, decide_system_one),
    SCORE: (ScoreRequest, score),
    EMBEDDINGS: (EmbeddingRequest, embed),
    CLASSIFY: (ClassificationRequest, classify),
    PAIRS: (PairsRequest, score_pairs),
}


class Line:
    """Requests that are prepared side by side and go to the engine in the order in which they came. One that keeps
    others waiting for longer than `STRAGGLER_SECONDS` loses its place."""

    def __init__(self) -> None:
        self._places: deque[Place] = deque()

    @contextmanager
    def join(self) -> Iterator[Place]:
        place = Place(self)
        self._places.append(place)
        self._call_first()
        try:
            yield place
        finally:
            self.leave(place)

    def leave(self, place: Place) -> None:
        if place in self._places:
            self._places.remove(place)
            place.called.set()
            self._call_first()

    def leave_stragglers(self, place: Place) -> None:
        """Those before `place` that are not ready."""
        for before in itertools.takewhile(lambda other: other is not place, tuple(self._places)):
            if not before.ready:
                self.leave(before)

    def _call_first(self) -> None:
        if self._places:
            self._places[0].called.set()


class Place:
    """In a line: an asynchronous context manager, entered when it is first. ready: it has only to be called."""

    def __init__(self, line: Line) -> None:
        self._line, self.called, self.ready = line, asyncio.Event(), False

    async def __aenter__(self) -> None:
        self.ready = True
        try:
            async with asyncio.timeout(STRAGGLER_SECONDS):
                await self.called.wait()
        except TimeoutError:
            self._line.leave_stragglers(self)
            await self.called.wait()

    async def __aexit__(self, *error: object) -> None:
        self._line.leave(self)


class LocalServer:
    """The routes of `served`, as a batch asks them. Lives on one event loop."""

    def __init__(
        self,
        served: Served,
        slots: int,
        inflight: InflightShare | None = None,
        turns: AbstractAsyncContextManager[object] | None = None,
        client: Client | None = None,
        deaths: DeathBudget | None = None,
    ) -> None:
        """slots: requests that the engine computes at one time. Beside the server's clients, inflight: bytes that they
        may hold; turns: of those that are prepared; client: whose they are, and within whose limits; deaths: how often
        they may end the engine."""
        self._served, self._inflight = served, inflight or served.inflight_bytes
        self._deaths = deaths or DeathBudget(0.0)
        self._turns, self._line = turns or nullcontext(), Line()
        self._client = client or served.clients.everybody
        self.slots = slots + PREPARED

    async def ask(self, url: str, body: Mapping[str, Any]) -> Answer:
        """Waits while the engine is starting, and while others hold all the memory that requests may have. Raises
        EngineDied, and SiglaneError when the engine is down for good."""
        async with self._client.batch_places:
            await self._admitted()
            return await self._ask(url, body)

    async def _admitted(self) -> None:
        while True:
            try:
                self._client.take_row()
            except RateLimited as error:
                await asyncio.sleep(min(error.seconds, LONGEST_WAIT))
            else:
                return

    async def _ask(self, url: str, body: Mapping[str, Any]) -> Answer:
        while True:
            pause = PATIENCE
            with self._line.join() as place, closing(ByteLease(self._inflight)) as lease:
                await self._ready()
                context = self._context(lease, place)
                try:
                    return await self._answer(url, body, context)
                except Exception as error:
                    reason = as_api_error(error)
                    if reason is not error:
                        logger.error("a request failed", exc_info=error, extra={"request_id": context.request_id})
                    code = reason.code if reason.status == 503 else None
                    if code == DOWN:
                        raise
                    if isinstance(reason, EngineLost):
                        self._deaths.note(reason.life)
                        raise EngineDied(alone=reason.clients <= 1) from error
                    alone = self._served.inflight_bytes.used == lease.held
                    if isinstance(reason, RateLimited):
                        pause = min(reason.seconds, LONGEST_WAIT)
                    elif code not in UNREADY and (code != FULL or alone):
                        return Answer(reason.status, dict(error_body(reason)))
            await asyncio.sleep(pause)

    def _context(self, lease: ByteLease, place: Place) -> RequestContext:
        return RequestContext(
            secrets.token_hex(16),
            lease,
            batch=True,
            turn=self._turns,
            place=place,
            admit=self._check_deaths,
            client=self._client,
        )

    def _check_deaths(self) -> None:
        """Raises EngineError (503) while they have ended the engine too often; while a row was prepared others may."""
        if self._deaths.rest > 0:
            raise overloaded("the engine has died too often of late", "engine_rests")

    async def _ready(self) -> None:
        """Returns when the engine has started, and has not died too often of late. SiglaneError when it never will."""
        while (rest := self._deaths.rest) > 0:
            await asyncio.sleep(min(rest, LONGEST_WAIT))
        while self._served.engine.state in ("starting", "restarting"):
            await asyncio.sleep(PATIENCE)
        if self._served.engine.state in ("dead", "closed"):
            self._served.engine.wait_ready()  # raises what has ended it

    async def _answer(self, url: str, given: Mapping[str, Any], context: RequestContext) -> Answer:
        served, chat, towers = self._served, self._served.chat, self._served.embed
        if given.get("stream"):
            raise UserError("a batch streams nothing; leave stream out", code="unsupported_field", param="stream")
        if url == SCORE and chat is None:
            url = PAIRS
        model, (kind, ask) = (chat, ASKED[url]) if url in OF_CHAT else (towers, ASKED.get(url, (None, None)))
        if model is None or kind is None:
            raise UserError(f"{served.name!r} does not answer {url}", code="not_found", status=404)
        asked = validated(kind, given)
        served.check_name(asked.model, model)
        found = await ask(asked, context, model)
        if url == EMBEDDINGS:
            found = orjson.loads(orjson.dumps(found))  # vectors are written out already
        return Answer(200, dict(found), tuple(ignored_fields(asked)))
