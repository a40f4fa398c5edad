"""The same answer as server-sent events.

    data: {..., "choices": [{"delta": {"role": "assistant", "content": "A"}, ...}]}     with the first token
    data: {..., "choices": [{"delta": {"reasoning_content": "B"}, ...}]}                  while a model reasons
    data: {..., "choices": [{"delta": {"tool_calls": [{"index": 0, ...}]}, ...}]}         when it calls a tool
    : keep-alive                                                                          when nothing is said
    data: {..., "choices": [{"delta": {}, "finish_reason": "stop", ...}]}
    data: {..., "choices": [], "usage": {...}}                                            when it was asked for
    data: [DONE]

A stream that fails ends with `data: {"error": {...}}` and [DONE], never with a finish_reason. One that fails before its
first event is an ordinary error response.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import orjson
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from siglane.errors import EngineError, UserError
from siglane.server.chat import Prepared, note_answer, prepare, reply_of, siglane_report, usage_reply
from siglane.server.choices import ChoiceDelta, Choices
from siglane.server.context import RequestContext
from siglane.server.errors import as_api_error, error_body
from siglane.server.generation_fields import StreamOptions
from siglane.server.protocol import ChatCompletionRequest, GenerationRequest
from siglane.server.replies import ChatCompletionChunk, ChunkChoice
from siglane.server.served import ChatModel
from siglane.server.tool_fields import call_delta

logger = logging.getLogger(__name__)

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = {
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # proxies that collect a response would collect the whole stream
}


def event(content: object) -> bytes:
    """One event. JSON has no line breaks outside of its escapes, so it always fits one data line."""
    return b"data: " + orjson.dumps(content) + b"\n\n"


def named_event(name: str, content: object) -> bytes:
    """One event of APIs that name theirs."""
    return b"event: " + name.encode() + b"\n" + event(content)


class EventStream(StreamingResponse):
    """A response that puts a prepared request to the engine and sends its answer as it comes; what an event looks like
    is its subclass's."""

    def __init__(
        self,
        request: GenerationRequest,
        prepared: Prepared,
        context: RequestContext,
        model: ChatModel,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__((), headers={**HEADERS, **(headers or {})}, media_type="text/event-stream")
        self._request, self._prepared, self._context, self._model = request, prepared, context, model
        self._options = request.stream_options or StreamOptions()
        self._reply = reply_of(prepared, model, int(time.time()))
        self._spoken: set[int] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        choices = await self._model.ask(self._prepared.requests, self._prepared.tool_use)
        try:
            events = self._events(choices)
            first = await anext(events)  # what goes wrong until here has a status code of its own
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await _write(send, first)
            try:
                async for data in events:
                    await _write(send, data)
            except Exception as error:
                await _write(send, self._failure(error))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._model.release(choices)

    async def _deltas(self, choices: Choices) -> AsyncIterator[ChoiceDelta | None]:
        """Those that say something; None where the client has heard nothing for too long."""
        silence, spoke = self._model.config.sse_keep_alive or None, time.monotonic()
        while not choices.finished:
            delta = await choices.next(silence)
            if delta is not None and self._says_something(delta):
                yield delta
            elif delta is None or (silence and time.monotonic() - spoke > silence):  # tokens whose text is held back
                yield None
            else:
                continue
            spoke = time.monotonic()

    async def _events(self, choices: Choices) -> AsyncIterator[bytes]:
        async for delta in self._deltas(choices):
            yield KEEP_ALIVE if delta is None else event(self._chunk(delta, choices))
        note_answer(choices, self._prepared, self._context, self._model)
        if self._options.include_usage:
            report = siglane_report(self._request, self._prepared, choices)
            yield event({**self._frame([]), "usage": usage_reply(choices.usage), "siglane": report})
        yield DONE

    def _failure(self, error: Exception) -> bytes:
        return event(error_body(self._failed(error))) + DONE

    def _failed(self, error: Exception) -> UserError | EngineError:
        """What the client is told of it; the log gets what it is not told."""
        reason = as_api_error(error)
        self._context.failed = reason.code
        if reason is not error:
            logger.error("a stream failed", exc_info=error, extra={"request_id": self._context.request_id})
        return reason

    def _says_something(self, delta: ChoiceDelta) -> bool:
        raise NotImplementedError

    def _chunk(self, delta: ChoiceDelta, choices: Choices) -> Mapping[str, object]:
        raise NotImplementedError

    def _frame(self, choices: list[Any]) -> Any:
        """A chunk around `choices`."""
        raise NotImplementedError

    def _with_report(self, chunk: Any, choices: Choices) -> Mapping[str, object]:
        """What the request asked to be told beside the text."""
        if self._options.continuous_usage_stats:
            chunk["usage"] = usage_reply(choices.usage)
        elif self._options.include_usage:
            chunk["usage"] = None
        if choices.finished and not self._options.include_usage:
            chunk["siglane"] = siglane_report(self._request, self._prepared, choices)
        return chunk


class ChatStream(EventStream):
    def _says_something(self, delta: ChoiceDelta) -> bool:
        first = delta.index not in self._spoken
        said = delta.text or delta.reasoning or delta.calls
        return bool(first or said or delta.finish_reason or delta.logprob)

    def _chunk(self, delta: ChoiceDelta, choices: Choices) -> Mapping[str, object]:
        choice: ChunkChoice = {
            "index": delta.index,
            "delta": {},
            "logprobs": None,
            "finish_reason": delta.finish_reason,
        }
        if delta.index not in self._spoken:
            self._spoken.add(delta.index)
            choice["delta"] = {"role": "assistant", "content": delta.text or (None if delta.calls else "")}
        elif delta.text or (delta.finish_reason is None and not delta.reasoning and not delta.calls):
            choice["delta"] = {"content": delta.text}
        if delta.calls:
            choice["delta"]["tool_calls"] = list(map(call_delta, delta.calls))
        if delta.reasoning:
            choice["delta"]["reasoning_content"] = delta.reasoning
        if delta.logprob is not None:
            choice["logprobs"] = self._model.token_texts.report([delta.logprob])
        if delta.finish_reason is not None:
            choice["matched_stop"] = choices.answers[delta.index].matched_stop
        return self._with_report(self._frame([choice]), choices)

    def _frame(self, choices: list[ChunkChoice]) -> ChatCompletionChunk:
        return {**self._reply, "object": "chat.completion.chunk", "choices": choices}


async def stream_chat(
    body: ChatCompletionRequest, context: RequestContext, model: ChatModel, headers: Mapping[str, str]
) -> ChatStream:
    """`complete` as it comes."""
    return ChatStream(body, await prepare(body, context, model), context, model, headers)


async def _write(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})
