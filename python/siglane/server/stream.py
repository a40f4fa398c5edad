"""The same answer as server-sent events.

    data: {..., "choices": [{"delta": {"role": "assistant", "content": "A"}, ...}]}     with the first token
    data: {..., "choices": [{"delta": {"reasoning_content": "B"}, ...}]}                  while a model reasons
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

import orjson
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from siglane.server.answer import Answer, Piece
from siglane.server.chat import Prepared, note_answer, siglane_report, usage_reply
from siglane.server.context import RequestContext
from siglane.server.errors import as_api_error, error_body
from siglane.server.protocol import ChatCompletionChunk, ChatCompletionRequest, ChunkChoice, StreamOptions
from siglane.server.served import ChatModel

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


class ChatStream(StreamingResponse):
    """A response that puts a prepared request to the engine and sends its answer as it comes."""

    def __init__(
        self,
        request: ChatCompletionRequest,
        prepared: Prepared,
        context: RequestContext,
        model: ChatModel,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__((), headers={**HEADERS, **(headers or {})}, media_type="text/event-stream")
        self._request, self._prepared, self._exchange, self._model = request, prepared, context, model
        self._options = request.stream_options or StreamOptions()
        self._created = int(time.time())
        self._spoken: set[int] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await self._model.ask(self._prepared.requests)
        try:
            events = self._events(answer)
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
            self._model.release(answer)

    async def _events(self, answer: Answer) -> AsyncIterator[bytes]:
        silence = self._model.config.sse_keep_alive or None
        while not answer.finished:
            piece = await answer.next(silence)
            if piece is None:
                yield KEEP_ALIVE
            elif self._says_something(piece):
                yield event(self._chunk(piece, answer))
        note_answer(answer, self._prepared, self._exchange, self._model)
        if self._options.include_usage:
            report = siglane_report(self._request, self._prepared, answer)
            yield event({**self._frame([]), "usage": usage_reply(answer.usage), "siglane": report})
        yield DONE

    def _failure(self, error: Exception) -> bytes:
        reason = as_api_error(error)
        self._exchange.failed = reason.code
        if reason is not error:
            logger.error("a stream failed", exc_info=error, extra={"request_id": self._exchange.request_id})
        return event(error_body(reason)) + DONE

    def _says_something(self, piece: Piece) -> bool:
        first = piece.index not in self._spoken
        said = piece.text or piece.reasoning
        return bool(first or said or piece.finish_reason or (self._request.logprobs and piece.logprobs))

    def _chunk(self, piece: Piece, answer: Answer) -> ChatCompletionChunk:
        choice: ChunkChoice = {
            "index": piece.index,
            "delta": {},
            "logprobs": None,
            "finish_reason": piece.finish_reason,
        }
        if piece.index not in self._spoken:
            self._spoken.add(piece.index)
            choice["delta"] = {"role": "assistant", "content": piece.text}
        elif piece.text or (piece.finish_reason is None and not piece.reasoning):
            choice["delta"] = {"content": piece.text}
        if piece.reasoning:
            choice["delta"]["reasoning_content"] = piece.reasoning
        if self._request.logprobs and piece.logprobs:
            choice["logprobs"] = self._model.token_texts.report(piece.logprobs)
        if piece.finish_reason is not None:
            choice["matched_stop"] = piece.matched_stop
        chunk = self._frame([choice])
        if self._options.continuous_usage_stats:
            chunk["usage"] = usage_reply(answer.usage)
        elif self._options.include_usage:
            chunk["usage"] = None
        if answer.finished and not self._options.include_usage:
            chunk["siglane"] = siglane_report(self._request, self._prepared, answer)
        return chunk

    def _frame(self, choices: list[ChunkChoice]) -> ChatCompletionChunk:
        return {
            "id": self._prepared.request_id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model.name,
            "system_fingerprint": self._model.fingerprint,
            "choices": choices,
        }


async def _write(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})
