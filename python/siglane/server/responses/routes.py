"""POST /v1/responses: OpenAI's Responses, without what needs a memory, as chats.

    event: response.created
    data: {"type": "response.created", "sequence_number": 0, "response": {...}}

An answer is a list of items: its reasoning, messages and calls of functions, each of which is told of when it begins,
while it grows and when it ends. One that fails ends with `response.failed`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

from fastapi import Request

from siglane.errors import EngineError, UserError
from siglane.server.chat import input_usage, note_answer
from siglane.server.choices import Choices
from siglane.server.errors import JsonResponse, message_of
from siglane.server.openapi import events_of, examples
from siglane.server.protocol import ChatCompletionRequest, plain
from siglane.server.responses.items import Output
from siglane.server.responses.protocol import (
    ItemCall,
    ItemCallOutput,
    ItemImage,
    ItemMessage,
    ResponseReply,
    ResponsesRequest,
)
from siglane.server.routes import ModelRoutes
from siglane.server.served import ChatModel
from siglane.server.stream import KEEP_ALIVE, named_event
from siglane.server.translated import TranslatedChat, TranslatedStream, Translation, translated

RESPONSES = "/v1/responses"
STORED_RESPONSES = (f"{RESPONSES}/{{response_id}}", f"{RESPONSES}/{{response_id}}/{{rest:path}}")
NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "response_format.json_schema.schema": "text.format.schema",
    "messages": "input",
}


def translate(body: ResponsesRequest) -> tuple[Translation, ChatCompletionRequest]:
    """UserError names the field of `body` that cannot be served."""
    found = Translation(NAMES)
    if body.instructions:
        found.say("system", body.instructions, "instructions")
    if isinstance(body.input, str):
        found.say("user", body.input, "input")
    else:
        for number, item in enumerate(body.input):
            _say(found, item, f"input[{number}]")
    choice = plain(body.tool_choice)
    chat = found.chat(
        **body.passed,
        model=body.model,
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        response_format=_response_format(body),
        tools=[{"type": "function", "function": _without_type(tool)} for tool in plain(body.tools) or ()] or None,
        tool_choice={"type": "function", "function": _without_type(choice)} if isinstance(choice, dict) else choice,
        parallel_tool_calls=body.parallel_tool_calls,
    )
    return found, chat


def _say(found: Translation, item: Any, place: str) -> None:
    match item:
        case ItemMessage(role=role, content=str(text)):
            found.say(role, text, place)
        case ItemMessage(role=role, content=parts):
            places = [f"{place}.content[{number}]" for number in range(len(parts))]
            found.say(role, list(map(_part, parts)), place, places)
        case ItemCall():
            found.call(item.call_id, item.name, item.arguments, place)
        case ItemCallOutput(output=str(text)):
            found.say("tool", text, place, tool_call_id=item.call_id)
        case ItemCallOutput(output=parts):
            places = [f"{place}.output[{number}]" for number in range(len(parts))]
            found.say("tool", list(map(_part, parts)), place, places, tool_call_id=item.call_id)


def _part(part: Any) -> Any:
    fields = plain(part)
    if not isinstance(part, ItemImage):
        return fields
    url = {"url": fields.pop("image_url")}
    return {"type": "image_url", "image_url": _without_type(fields) | url}


def _without_type(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "type"}


def _response_format(body: ResponsesRequest) -> dict[str, Any] | None:
    wanted = None if body.text is None or body.text.format is None else body.text.format
    if wanted is None:
        return None
    schema = {"schema": wanted.schema_, "name": wanted.name, "strict": wanted.strict}
    stated = {name: value for name, value in schema.items() if value is not None}
    return {"type": wanted.type} | ({"json_schema": stated} if wanted.type == "json_schema" else {})


@dataclass(frozen=True, slots=True)
class Asked:
    """A response that can be asked for, and what is told of it. output: of it so far."""

    body: ResponsesRequest
    chat: TranslatedChat
    response_id: str = field(default_factory=lambda: f"resp_{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    output: Output = field(default_factory=Output)

    def reply(self, choices: Choices | None = None, error: UserError | EngineError | None = None) -> ResponseReply:
        """choices: once they have ended; error: why they never will."""
        body, sampling = self.body, self.chat.prepared.requests[0].sampling
        status = "failed" if error else "in_progress" if choices is None else ending(choices)
        code = "server_error" if error is None or error.status >= 500 else "invalid_prompt"
        return {
            "id": self.response_id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None if error is None else {"code": code, "message": message_of(error)},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.chat.model.name,
            "output": [] if choices is None else self.output.items,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": sampling.temperature,
            "text": plain(body.text) or {"format": {"type": "text"}},
            "tool_choice": plain(body.tool_choice) or "auto",
            "tools": plain(body.tools) or [],
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None if choices is None else input_usage(choices.usage),
        }


def ending(choices: Choices) -> Literal["completed", "incomplete"]:
    return "incomplete" if choices.answers[0].finish_reason == "length" else "completed"


async def respond(asked: Asked) -> ResponseReply:
    """The whole response at once."""
    choices = await asked.chat.answered(asked.output)
    list(asked.output.end(ending(choices)))
    return asked.reply(choices)


class ResponseStream(TranslatedStream):
    """The same as events."""

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked.chat)
        self._asked, self._numbers = asked, count()

    async def _events(self, choices: Choices) -> AsyncIterator[bytes]:
        begun = False
        async for delta in self._deltas(choices):
            if delta is None:
                yield KEEP_ALIVE
                continue
            if not begun:
                yield self._of_all("response.created") + self._of_all("response.in_progress")
                begun = True
            yield b"".join(map(self._event, self._asked.output.take(delta)))
        note_answer(choices, self._prepared, self._context, self._model)
        status = ending(choices)
        yield b"".join(map(self._event, self._asked.output.end(status))) + self._of_all(f"response.{status}", choices)

    def _failure(self, error: Exception) -> bytes:
        return self._event({"type": "response.failed", "response": self._asked.reply(error=self._failed(error))})

    def _of_all(self, kind: str, choices: Choices | None = None) -> bytes:
        return self._event({"type": kind, "response": self._asked.reply(choices)})

    def _event(self, content: Mapping[str, Any]) -> bytes:
        return named_event(content["type"], {**content, "sequence_number": next(self._numbers)})


def add_responses(routes: ModelRoutes[ChatModel]) -> None:
    question = {"model": routes.model.name, "input": "What can you do?", "max_output_tokens": 16}
    shown = examples(a_question=question, a_stream=question | {"stream": True})

    async def create_response(body: ResponsesRequest, request: Request) -> Any:
        """Nothing is stored, whether `store` says so or is absent."""
        asked = Asked(body, await translated(body, request, translate, routes))
        if body.stream:
            return ResponseStream(asked)
        return JsonResponse(await respond(asked), headers=asked.chat.headers)

    events = events_of("an event of a response")
    routes.post((RESPONSES,), create_response, ResponseReply, shown, content=events)
