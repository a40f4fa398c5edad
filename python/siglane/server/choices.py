"""The n choices of one client request, read from the engine's process by one task."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from siglane.engine.answers.answer import Answer
from siglane.engine.answers.tool_calls import CallDelta
from siglane.engine.process.supervisor import EngineProcess
from siglane.server.errors import overloaded
from siglane.server.replies import FinishReason
from siglane.types import TokenDelta, TokenLogprob, Usage


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What became known of choice number `index`. finish_reason: on its last one; reasoning comes before the text."""

    index: int
    text: str
    reasoning: str
    calls: tuple[CallDelta, ...]
    logprob: TokenLogprob | None
    finish_reason: FinishReason | None


class Choices:
    """One request's `answers`, which `next` reads. `close` must be called, however the reading task ends.

    What waits to be read is bounded by the tokens that the request may generate.
    """

    def __init__(self, answers: Sequence[Answer], engine: EngineProcess, commands: Executor, prompts: int = 1) -> None:
        """prompts: that the answers are of, each has as many of them, one after the other."""
        self.answers, self._prompts = answers, prompts
        self._indices = {answer.request_id: index for index, answer in enumerate(answers)}
        self._engine, self._commands = engine, commands
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[TokenDelta | Exception] = asyncio.Queue()
        self._unread: deque[ChoiceDelta] = deque()
        self.asked = time.monotonic()
        self.first_token: float | None = None

    async def next(self, timeout: float | None = None) -> ChoiceDelta | None:
        """The next delta; None when `timeout` seconds went by without one. Raises what ended the request early."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while not self._unread:
                    self._take(await self._arrived.get())
        return self._unread.popleft() if self._unread else None

    @property
    def finished(self) -> bool:
        """Whether everything has been read."""
        return not self._unread and all(answer.finished for answer in self.answers)

    def fail(self, error: Exception) -> None:
        """Ends the request with `error`, which its reader gets."""
        self._arrived.put_nowait(error)

    def close(self) -> None:
        """Aborts what still runs."""
        for answer in self.answers:
            if answer.finished is None:
                self._abort(answer)

    @property
    def usage(self) -> Usage:
        """A prompt counts once; what was cached of it is what every choice found cached."""
        every = [answer.usage for answer in self.answers]
        each = len(every) // self._prompts
        of_prompts = [every[first : first + each] for first in range(0, len(every), each)]
        return replace(
            every[0],
            prompt_tokens=sum(usages[0].prompt_tokens for usages in of_prompts),
            image_tokens=sum(usages[0].image_tokens for usages in of_prompts),
            cached_tokens=sum(min(usage.cached_tokens for usage in usages) for usages in of_prompts),
            completion_tokens=sum(usage.completion_tokens for usage in every),
            reasoning_tokens=sum(usage.reasoning_tokens for usage in every),
            accepted_prediction_tokens=sum(usage.accepted_prediction_tokens for usage in every),
            rejected_prediction_tokens=sum(usage.rejected_prediction_tokens for usage in every),
        )

    @property
    def stages(self) -> dict[str, float]:
        """Seconds in the engine by stage, of the slowest choice, once all have ended."""
        every = [answer.finished.timings for answer in self.answers if answer.finished]
        slowest = max(every, key=lambda one: one.queue + one.encode + one.prefill + one.decode)
        return {
            "queue": slowest.queue,
            "encode": slowest.encode,
            "prefill": slowest.prefill,
            "generate": slowest.decode,
        }

    def on_delta(self, delta: TokenDelta) -> None:
        """Called on the engine's reader thread."""
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is left to read
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, delta)

    def _take(self, delta: TokenDelta | Exception) -> None:
        if isinstance(delta, Exception):
            raise delta
        index = self._indices[delta.request_id]
        answer = self.answers[index]
        ended = answer.ended
        told = answer.take(delta)
        if delta.token_id is not None and self.first_token is None:
            self.first_token = time.monotonic()
        if answer.finished is None and ended:
            return  # the engine has not heard of its end yet
        if answer.finished is None and answer.ended:
            self._abort(answer)
        reason = finish_reason(answer)
        self._unread.append(ChoiceDelta(index, *told, None if ended else delta.logprob, reason))

    def _abort(self, answer: Answer) -> None:
        with contextlib.suppress(RuntimeError):  # the server is closing: the engine goes with it
            self._commands.submit(self._engine.abort, answer.request_id)


def finish_reason(answer: Answer) -> FinishReason | None:
    """How a choice ended for its client, None while it runs. Raises what ended it early."""
    match answer.finish_reason:
        case "error":
            raise answer.error or RuntimeError("the engine gave no reason")
        case "abort":
            raise overloaded("the request was ended by the server", code="request_aborted")
        case reason:
            return reason
