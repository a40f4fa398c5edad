"""The fields of a chat request that name tools, and what an answer tells of calls: OpenAI's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from siglane.engine.answers.tool_calls import CallDelta
from siglane.engine.constraints.tool_grammar import tool_constraint
from siglane.errors import blaming
from siglane.families.prompt.call_format import CallFormat
from siglane.media.tools import MOST_TOOLS, NAME
from siglane.server.constraints import AskedConstraint
from siglane.server.fields import RequestModel
from siglane.server.replies import FunctionDelta, ToolCallDelta, ToolCallReply
from siglane.types import ToolCall, ToolUse


class FunctionDefinition(RequestModel):
    """parameters: JSON schema of an object; strict: calls are held to it."""

    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(RequestModel):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(RequestModel):
    name: str


class NamedTool(RequestModel):
    type: Literal["function"]
    function: NamedFunction


class FunctionCall(RequestModel):
    name: str
    arguments: str


class EarlierCall(RequestModel):
    """Of an earlier answer, as clients send it back."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


def choice_tag(choice: Any) -> str:
    return "#word" if isinstance(choice, str) else "#function"


Tools = Annotated[list[ToolDefinition], Field(max_length=MOST_TOOLS)]
ChoiceWord = Literal["none", "auto", "required"]
ToolChoice = Annotated[
    Annotated[ChoiceWord, Tag("#word")] | Annotated[NamedTool, Tag("#function")], Discriminator(choice_tag)
]


def with_tools(use: ToolUse, form: CallFormat, asked: AskedConstraint | None) -> AskedConstraint | None:
    """What the answer has to match, calls among it. form: of the calls; asked: what the text of one without calls has
    to."""
    param = "tools" if asked is None or use.required else asked.param
    with blaming(param):
        found = tool_constraint(use, form, None if asked is None else asked.constraint)
    return None if found is None else AskedConstraint(param, found)


def call_replies(calls: Sequence[ToolCall]) -> list[ToolCallReply]:
    return [
        {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls
    ]


def call_delta(delta: CallDelta) -> ToolCallDelta:
    if not delta.name:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    function: FunctionDelta = {"name": delta.name, "arguments": delta.arguments}
    return {"index": delta.index, "id": delta.call_id, "type": "function", "function": function}
