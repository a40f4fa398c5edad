"""The blocks of a message's answer, the events that tell of them while they grow, and errors in Anthropic's shape."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from siglane.engine.answers.tool_calls import CallDelta
from siglane.server.messages.protocol import AnthropicFailure, ReplyBlock
from siglane.server.translated import AnswerParts, Event

ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class Blocks(AnswerParts):
    """Of a message's answer."""

    def __init__(self) -> None:
        self.content: list[ReplyBlock] = []
        self._arguments: str | None = None  # of the tool_use that is growing
        self._growing = False

    def end(self) -> Iterator[Event]:
        """An answer that says nothing has one empty text."""
        if all(block["type"] == "thinking" for block in self.content):
            yield from self._begin({"type": "text", "text": ""})
        yield from self._close()

    def _take_call(self, call: CallDelta) -> Iterator[Event]:
        if call.name:
            yield from self._begin({"type": "tool_use", "id": call.call_id, "name": call.name, "input": {}})
            self._arguments = ""
        if call.arguments:
            self._arguments = (self._arguments or "") + call.arguments
            yield self._delta({"type": "input_json_delta", "partial_json": call.arguments})

    def _grow(self, said: Literal["reasoning", "text"], text: str) -> Iterator[Event]:
        kind: Literal["text", "thinking"] = "text" if said == "text" else "thinking"
        if not self._growing or self.content[-1]["type"] != kind:
            empty: ReplyBlock = {"type": "text", "text": ""}
            if kind == "thinking":
                empty = {"type": "thinking", "thinking": "", "signature": ""}
            yield from self._begin(empty)
        self.content[-1][kind] += text
        yield self._delta({"type": f"{kind}_delta", kind: text})

    def _begin(self, block: ReplyBlock) -> Iterator[Event]:
        yield from self._close()
        self.content.append(block)
        self._growing = True
        yield {"type": "content_block_start", "index": len(self.content) - 1, "content_block": {**block}}

    def _close(self) -> Iterator[Event]:
        if not self._growing:
            return
        if self._arguments is not None:
            self.content[-1]["input"] = _object(self._arguments)
        self._arguments, self._growing = None, False
        yield {"type": "content_block_stop", "index": len(self.content) - 1}

    def _delta(self, delta: Mapping[str, str]) -> Event:
        return {"type": "content_block_delta", "index": len(self.content) - 1, "delta": delta}


def _object(arguments: str) -> dict[str, Any]:
    """Of a call that `max_tokens` has cut nothing can be read."""
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def failure(status: int, error: Mapping[str, Any], request_id: str | None) -> AnthropicFailure:
    """error: OpenAI's."""
    kind = ERRORS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    told = {"type": kind, "message": error["message"], "code": error["code"], "param": error["param"]}
    return {"type": "error", "error": told, "request_id": request_id}  # type: ignore[typeddict-item]


class AnthropicShape:
    """Takes the key for `path` and below it from where Anthropic's clients send it, and gives errors in its shape."""

    def __init__(self, app: ASGIApp, path: str) -> None:
        self.app, self.path = app, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not f"{scope['path']}/".startswith(f"{self.path}/"):
            await self.app(scope, receive, send)
            return
        keys = [value for name, value in scope["headers"] if name == b"x-api-key"]
        if len(keys) == 1 and not any(name == b"authorization" for name, _ in scope["headers"]):
            scope = {**scope, "headers": [*scope["headers"], (b"authorization", b"Bearer " + keys[0])]}
        await self.app(scope, receive, _reshaping(send))


def _reshaping(send: Send) -> Send:
    held: list[Message] = []

    async def reshaping(message: Message) -> None:
        """Holds the start of an error until its body is there; ours come in one piece."""
        if message["type"] == "http.response.start" and message["status"] >= 400:
            held.append(message)
        elif held:
            start = held.pop()
            headers = dict(start["headers"])
            request_id = headers.get(b"x-request-id", b"").decode() or None
            body = orjson.dumps(failure(start["status"], orjson.loads(message["body"])["error"], request_id))
            headers[b"content-length"] = str(len(body)).encode()
            await send({**start, "headers": list(headers.items())})
            await send({**message, "body": body})
        else:
            await send(message)

    return reshaping
