"""Another API's request as a chat's, and what is wrong with it told in that API's own words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from siglane.errors import UserError
from siglane.server.chat import Prepared, prepare
from siglane.server.context import RequestContext
from siglane.server.errors import validated
from siglane.server.protocol import ChatCompletionRequest
from siglane.server.served import ChatModel

_MESSAGE = re.compile(r"messages\[(\d+)\](?:\.(content|tool_calls)\[(\d+)\])?")
_TOOL = re.compile(r"(tools\[\d+\])(?:\.function)?(.*)")


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

    async def prepared(self, chat: ChatCompletionRequest, context: RequestContext, model: ChatModel) -> Prepared:
        """What `chat` gave, ready for the engine. UserError names the client's field."""
        with self.telling():
            async with context.turn:
                return await prepare(chat, context, model)

    def _param(self, param: str) -> str:
        if (found := _MESSAGE.match(param)) and int(found[1]) < len(self._places):
            place, inner = self._places[int(found[1])]
            parts = inner.get(found[2], [])
            return parts[int(found[3])] if found[3] and int(found[3]) < len(parts) else place
        if found := _TOOL.match(param):
            return found[1] + self._tool_field(found[2])
        known = max((name for name in self._names if param.startswith(name)), key=len, default="")
        return self._names.get(known, "") + param[len(known) :]
