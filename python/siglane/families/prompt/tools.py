"""Tools, calls of them and their results: how a chat template takes them, found out by trying it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

from siglane.errors import UserError
from siglane.families.prompt.call_format import FORMATS, CallFormat
from siglane.families.prompt.probe import PROBE
from siglane.media.tools import depth
from siglane.types import Message, Tool, ToolCall

DEEPEST = 32  # lists and objects in each other; what is deeper stays a text

_KEYS = (
    "type",
    "function",
    "name",
    "description",
    "parameters",
    "arguments",
    "properties",
    "required",
    "items",
    "enum",
)
_WORDS = frozenset({*_KEYS, "object", "array", "string", "integer", "number", "boolean", "null"})
_NAME, _KEY, _VALUE = "siglane_probe", "siglane_key", "siglane value"
_ID = "siglane01"  # nine letters and digits, which Mistral's templates ask for
_PROBE_TOOL = Tool(_NAME, _VALUE, {"type": "object", "properties": {_KEY: {"type": "string"}}})

RenderTools = Callable[[list[dict[str, Any]], Sequence[dict[str, Any]]], str]  # turns and tools to text


class ToolFormat(NamedTuple):
    """arguments_as_object: the template writes the object's JSON itself, else it gets the text; content_as_parts: it
    takes a tool's answer as a list of parts, else as one string; answers: how the model writes calls, None where it is
    told of no tools or its template has calls written in a form that is not known."""

    arguments_as_object: bool
    content_as_parts: bool
    answers: CallFormat | None = None

    def call(self, call: ToolCall, broken: Callable[[str], str]) -> dict[str, Any]:
        """A call as the template gets it; `broken` is applied to every text."""
        arguments = _object(call.arguments) if self.arguments_as_object else call.arguments
        function = {"name": broken(call.name), "arguments": each_text(arguments, broken)}
        return {"id": broken(call.call_id), "type": "function", "function": function}


def tool_format(render: RenderTools, question: dict[str, Any], answer: dict[str, Any]) -> ToolFormat | None:
    """How the template of `render` takes tools; None when it leaves a call or its result out.

    question, answer: a turn of the user and an empty one of the assistant, as the template takes them.
    """
    for as_object, as_parts in product((True, False), (False, True)):
        found = ToolFormat(as_object, as_parts)
        call = found.call(ToolCall(_NAME, json.dumps({_KEY: _VALUE}), _ID), str)
        content = [{"type": "text", "text": PROBE}] if as_parts else PROBE
        result = {"role": "tool", "tool_call_id": _ID, "name": _NAME, "content": content}
        turns = [question, answer | {"tool_calls": [call]}, result]
        try:
            rendered = render(turns, ())
        except UserError:
            continue
        if all(word in rendered for word in (_NAME, _KEY, _VALUE, PROBE)) and "'type'" not in rendered:
            return found._replace(answers=_call_format(rendered, render, question))
    return None


def _call_format(history: str, render: RenderTools, question: dict[str, Any]) -> CallFormat | None:
    """The form in which `history` holds the call, of a template that writes what a function is called and takes."""
    try:
        asked, told = render([question], ()), render([question], (_PROBE_TOOL.definition,))
    except UserError:
        return None
    if _NAME not in told or _KEY not in told:
        return None
    return next((form for form in FORMATS if form.written_in(history, asked, _NAME, {_KEY: _VALUE})), None)


def check_tools(messages: Sequence[Message], tools: Sequence[Tool], found: ToolFormat | None) -> None:
    """UserError names what a template would leave out: tools, or the first message with a call or a result."""
    if tools and (found is None or found.answers is None):
        known = ", ".join(form.example for form in FORMATS)
        text = f"tools: this model's chat template tells it of none, or has calls written otherwise than {known}"
        raise UserError(text, code="unsupported_field", param="tools")
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
    return found if isinstance(found, dict) and depth(found) <= DEEPEST else arguments


def each_text(value: Any, broken: Callable[[str], str]) -> Any:
    """JSON with `broken` applied to its texts and keys, but not to the words that templates look for: what might
    complete one of them to a reserved string stands beside it, and is broken."""
    match value:
        case str():
            return value if value in _WORDS else broken(value)
        case dict():
            return {each_text(key, broken): each_text(inner, broken) for key, inner in value.items()}
        case list() | tuple():
            return [each_text(inner, broken) for inner in value]
    return value
