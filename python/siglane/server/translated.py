"""Another API's request as a chat's, and what is wrong with it told in that API's own words."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from fastapi import Request

from siglane.engine.answers.tool_calls import CallDelta
from siglane.errors import UserError
from siglane.server.chat import Prepared, answered, prepare
from siglane.server.choices import ChoiceDelta, Choices
from siglane.server.context import RequestContext, context_of
from siglane.server.errors import validated
from siglane.server.protocol import ChatCompletionRequest
from siglane.server.refused import TranslatedRequest
from siglane.server.routes import ModelRoutes
from siglane.server.served import ChatModel
from siglane.server.stream import EventStream

_MESSAGE = re.compile(r"messages\[(\d+)\](?:\.(content|tool_calls)\[(\d+)\])?")
_TOOL = re.compile(r"(tools\[\d+\])(?:\.function)?(.*)")

Body = TypeVar("Body", bound=TranslatedRequest)
Event = dict[str, Any]


class Translation:
    """A chat's request that is written field by field, and where in the client's each part stands.

    names: of the client's fields, by the chat's; tool_field: the client's name of what a chat's tool has behind
    `function`, such as `.parameters`.
    """

    def __init__(self, names: Mapping[str, str], tool_field: Callable[[str], str] = str) -> None:
        self.messages: list[dict[str, Any]] = []
        self._places: list[tuple[str, dict[str, list[str]]]] = []
        self._names, self._tool_field = names, tool_field

    def say(self, role: str, content: Any, place: str, parts: Sequence[str] = (), **fields: Any) -> None:
        """One message more. place: of the message; parts: of each of its content's."""
        self.messages.append({"role": role, "content": content, **fields})
        self._places.append((place, {"content": [*parts], "tool_calls": []}))

    def call(self, call_id: str, name: str, arguments: str, place: str) -> None:
        """A call of the assistant's, beside what it has just said."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.say("assistant", None, place)
        function = {"name": name, "arguments": arguments}
        self.messages[-1].setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})
        self._places[-1][1]["tool_calls"].append(place)

    def chat(self, **fields: Any) -> ChatCompletionRequest:
        """With what else it asks; None is as good as absent."""
        with self.telling():
            stated = {name: value for name, value in fields.items() if value is not None}
            return validated(ChatCompletionRequest, {**stated, "messages": self.messages})

    @contextmanager
    def telling(self) -> Iterator[None]:
        """What is raised inside names the client's field."""
        try:
            yield
        except UserError as error:
            if error.param is None:
                raise
            param = self._param(error.param)
            message = error.message.replace(error.param, param)
            raise UserError(message, code=error.code, param=param, status=error.status) from error

    def _param(self, param: str) -> str:
        if (found := _MESSAGE.match(param)) and int(found[1]) < len(self._places):
            place, inner = self._places[int(found[1])]
            parts = inner.get(found[2], [])
            return parts[int(found[3])] if found[3] and int(found[3]) < len(parts) else place
        if found := _TOOL.match(param):
            return found[1] + self._tool_field(found[2])
        known = max((name for name in self._names if param.startswith(name)), key=len, default="")
        return self._names.get(known, "") + param[len(known) :]


class AnswerParts(ABC):
    """An answer as another API's list of parts, made of a chat's deltas, and the events that tell how it grows."""

    def take(self, delta: ChoiceDelta) -> Iterator[Event]:
        if delta.reasoning:
            yield from self._grow("reasoning", delta.reasoning)
        if delta.text:
            yield from self._grow("text", delta.text)
        for call in delta.calls:
            yield from self._take_call(call)

    @abstractmethod
    def _grow(self, said: Literal["reasoning", "text"], text: str) -> Iterator[Event]:
        """By some text, in a new part where another kind was growing."""

    @abstractmethod
    def _take_call(self, call: CallDelta) -> Iterator[Event]: ...


@dataclass(frozen=True, slots=True)
class TranslatedChat:
    """Another API's request as a chat, ready for the engine. headers: of its answer."""

    request: ChatCompletionRequest
    prepared: Prepared
    context: RequestContext
    model: ChatModel
    headers: Mapping[str, str]

    async def answered(self, parts: AnswerParts) -> Choices:
        """Once they have ended and `parts` have taken them."""
        return await answered(self.prepared, self.context, self.model, lambda delta: list(parts.take(delta)))


async def translated(
    body: Body,
    request: Request,
    translate: Callable[[Body], tuple[Translation, ChatCompletionRequest]],
    routes: ModelRoutes[ChatModel],
) -> TranslatedChat:
    """UserError names the client's field."""
    context = context_of(request.scope)
    routes.check_name(body.model)
    translation, chat = translate(body)
    headers = routes.told(chat)
    with translation.telling():
        async with context.turn:
            prepared = await prepare(chat, context, routes.model)
    return TranslatedChat(chat, prepared, context, routes.model, headers)


class TranslatedStream(EventStream):
    """An answer as another API's events."""

    def __init__(self, chat: TranslatedChat) -> None:
        super().__init__(chat.request, chat.prepared, chat.context, chat.model, chat.headers)

    def _says_something(self, delta: ChoiceDelta) -> bool:
        return bool(delta.text or delta.reasoning or delta.calls or delta.finish_reason)
