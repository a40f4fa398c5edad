"""One client request inside the engine: its choices, their text and their tokens as they come."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

from siglane.engine.process import EngineProcess
from siglane.engine.reasoning import AnswerStream, Said
from siglane.server.errors import overloaded
from siglane.server.protocol import FinishReason
from siglane.types import Request, Timings, TokenDelta, TokenLogprob, Usage


@dataclass(frozen=True, slots=True)
class Piece:
    """What became known of one choice. finish_reason and matched_stop are set on its last piece.

    reasoning: comes before the text; one piece may hold the end of the one and the beginning of the other.
    """

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None = None
    matched_stop: str | int | None = None
    reasoning: str = ""


@dataclass(slots=True)
class _Choice:
    """One choice on its way."""

    request: Request
    stream: AnswerStream
    tokens: int = 0
    finished: bool = False
    cached_tokens: int = 0
    timings: Timings = field(default_factory=Timings)


class Answer:
    """The choices of one request, read by one task through `next`. `close` must be called, however that task ends.

    What waits to be read is bounded by the tokens that the request may generate.
    """

    def __init__(
        self, requests: Sequence[Request], streams: Sequence[AnswerStream], engine: EngineProcess, commands: Executor
    ) -> None:
        self._choices = [_Choice(*pair) for pair in zip(requests, streams, strict=True)]
        self._indices = {request.request_id: index for index, request in enumerate(requests)}
        self._engine, self._commands = engine, commands
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[TokenDelta | Exception] = asyncio.Queue()
        self._pieces: deque[Piece] = deque()
        self.first_token: float | None = None

    async def start(self) -> None:
        """Hands the request to the engine. EngineError (503) when the engine is not ready."""
        for choice in self._choices:
            # on the one thread for commands: a full pipe would block the event loop, and an abort must not overtake
            await self._loop.run_in_executor(self._commands, self._engine.submit, choice.request, self._on_delta)

    async def next(self, timeout: float | None = None) -> Piece | None:
        """The next piece; None when `timeout` seconds went by without one. Raises what ended the request early."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while not self._pieces:
                    self._take(await self._arrived.get())
        return self._pieces.popleft() if self._pieces else None

    @property
    def finished(self) -> bool:
        """Whether all pieces have been read."""
        return not self._pieces and all(choice.finished for choice in self._choices)

    def fail(self, error: Exception) -> None:
        """Ends the request with `error`, which its reader gets."""
        self._arrived.put_nowait(error)

    def close(self) -> None:
        """Aborts what still runs."""
        for choice in self._choices:
            if not choice.finished:
                self._abort(choice)

    @property
    def usage(self) -> Usage:
        """The prompt counts once; what was cached is what every choice found cached."""
        prompt = self._choices[0].request.prompt
        return Usage(
            prompt_tokens=len(prompt.token_ids),
            completion_tokens=sum(choice.tokens for choice in self._choices),
            cached_tokens=min(choice.cached_tokens for choice in self._choices),
            image_tokens=prompt.image_tokens,
            reasoning_tokens=sum(choice.stream.reasoning_tokens for choice in self._choices),
        )

    @property
    def stages(self) -> dict[str, float]:
        """Seconds in the engine by stage, of the slowest choice."""
        every = [choice.timings for choice in self._choices]
        slowest = max(every, key=lambda one: one.queue + one.encode + one.prefill + one.decode)
        return {
            "queue": slowest.queue,
            "encode": slowest.encode,
            "prefill": slowest.prefill,
            "generate": slowest.decode,
        }

    def _on_delta(self, delta: TokenDelta) -> None:
        """Called on the engine's reader thread."""
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is left to read
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, delta)

    def _take(self, delta: TokenDelta | Exception) -> None:
        if isinstance(delta, Exception):
            raise delta
        index = self._indices[delta.request_id]
        choice = self._choices[index]
        if choice.finished:  # ended here, by a stop string; the engine had not heard of it yet
            return
        choice.cached_tokens, choice.timings = delta.cached_tokens, delta.timings
        if delta.finish_reason == "error":
            choice.finished = True
            raise delta.error or RuntimeError("the engine gave no reason")
        if delta.finish_reason == "abort":
            choice.finished = True
            raise overloaded("the request was ended by the server", code="request_aborted")
        if delta.token_ids and self.first_token is None:
            self.first_token = time.monotonic()
        self._pieces.append(self._piece(index, choice, delta))

    def _piece(self, index: int, choice: _Choice, delta: TokenDelta) -> Piece:
        """Token by token, so that text and token count at a stop string do not depend on how tokens were grouped."""
        shown = delta.token_ids if delta.matched_stop is None else delta.token_ids[:-1]  # what ended it is only counted
        said, taken = [], len(delta.token_ids)
        for number, token_id in enumerate(shown, start=1):
            said.append(choice.stream.push([token_id]))
            if choice.stream.stopped is not None:
                taken = number
                break
        if delta.finish_reason is not None:
            said.append(choice.stream.push([], finished=True))
        text, reasoning = Said.joined(said)
        choice.tokens += taken
        logprobs = delta.logprobs[:taken]
        if choice.stream.stopped is not None:
            choice.finished = True
            if delta.finish_reason is None:
                self._abort(choice)
            return Piece(index, text, logprobs, "stop", choice.stream.stopped, reasoning)
        if delta.finish_reason is None:
            return Piece(index, text, logprobs, reasoning=reasoning)
        choice.finished = True
        reason: FinishReason = "stop" if delta.finish_reason == "stop" else "length"
        return Piece(index, text, logprobs, reason, delta.matched_stop, reasoning)

    def _abort(self, choice: _Choice) -> None:
        with contextlib.suppress(RuntimeError):  # the server is closing: the engine goes with it
            self._commands.submit(self._engine.abort, choice.request.request_id)
