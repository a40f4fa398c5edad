"""Calls of tools in the history, and their results: how a chat template takes them, found out by trying it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

from siglane.errors import UserError
from siglane.families.prompt.probe import PROBE, Render
from siglane.types import Message, ToolCall

DEEPEST = 32  # lists and objects in each other; what is deeper stays a text

_NAME, _KEY, _VALUE = "siglane_probe", "siglane_key", "siglane value"
_ID = "siglane01"  # nine letters and digits, which Mistral's templates ask for


class ToolFormat(NamedTuple):
    """arguments_as_object: the template writes the object's JSON itself, else it gets the text; content_as_parts: it
    takes a tool's answer as a list of parts, else as one string."""

    arguments_as_object: bool
    content_as_parts: bool

    def call(self, call: ToolCall, broken: Callable[[str], str]) -> dict[str, Any]:
        """A call as the template gets it; `broken` is applied to every text."""
        arguments = _object(call.arguments) if self.arguments_as_object else call.arguments
        function = {"name": broken(call.name), "arguments": _each_text(arguments, broken)}
        return {"id": broken(call.call_id), "type": "function", "function": function}


def tool_format(render: Render, question: dict[str, Any], answer: dict[str, Any]) -> ToolFormat | None:
    """How the template of `render` takes tools; None when it leaves a call or its result out.

    question, answer: a turn of the user and an empty one of the assistant, as the template takes them.
    """
    for as_object, as_parts in product((True, False), (False, True)):
        found = ToolFormat(as_object, as_parts)
        call = found.call(ToolCall(_NAME, json.dumps({_KEY: _VALUE}), _ID), str)
        content = [{"type": "text", "text": PROBE}] if as_parts else PROBE
        result = {"role": "tool", "tool_call_id": _ID, "name": _NAME, "content": content}
        try:
            rendered = render([question, answer | {"tool_calls": [call]}, result])
        except UserError:
            continue
        if all(word in rendered for word in (_NAME, _KEY, _VALUE, PROBE)) and "'type'" not in rendered:
            return found
    return None


def check_tools(messages: Sequence[Message], found: ToolFormat | None) -> None:
    """UserError names the first message that a template without tools would leave out."""
    for number, message in enumerate(messages):
        if found is None and (message.tool_calls or message.role == "tool"):
            place = f"messages[{number}].{'tool_calls' if message.tool_calls else 'role'}"
            text = f"{place}: this model's chat template has no place for tools' calls and results; leave them out"
            raise UserError(text, code="unsupported_field", param=place)


def _object(arguments: str) -> Any:
    """The object that a text is the JSON of; models write others too, which stay texts."""
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) and _depth(found) <= DEEPEST else arguments


def _depth(value: Any) -> int:
    """Of lists and objects in each other; counted in layers, so that no depth is too deep to be counted."""
    depth, layer = 0, [value]
    while layer := [one for one in layer if isinstance(one, dict | list)]:
        depth += 1
        layer = [inner for one in layer for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def _each_text(value: Any, broken: Callable[[str], str]) -> Any:
    match value:
        case str():
            return broken(value)
        case dict():
            return {broken(key): _each_text(inner, broken) for key, inner in value.items()}
        case list():
            return [_each_text(inner, broken) for inner in value]
    return value
