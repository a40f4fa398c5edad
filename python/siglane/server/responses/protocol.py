"""What clients send to and get from /v1/responses: OpenAI's Responses, in their stateless part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Discriminator, Field, Tag, model_validator
from typing_extensions import TypedDict  # pydantic reads no other on Python 3.11

from siglane.errors import UserError
from siglane.media.tools import MOST_TOOLS, NAME
from siglane.server.fields import WHOLE, RequestModel, Url, of_kinds
from siglane.server.protocol import MAX_PARTS, TEXTS, Budgets, PlainText, RefusalPart, TextPart, content_tag, kind_of
from siglane.server.refused import TranslatedRequest
from siglane.server.replies import InputUsage
from siglane.server.tool_fields import ChoiceWord, NamedFunction, choice_tag
from siglane.types import SAMPLING_BOUNDS

MAX_ITEMS = 2048
# what asks for stored responses or for what a chat is asked otherwise, with the values that ask for nothing
REFUSED: Mapping[str, tuple[object, ...]] = {
    "background": (),
    "context_management": (),
    "conversation": (),
    "logprobs": (),
    "max_completion_tokens": (),
    "max_tokens": (),
    "messages": (),
    "moderation": (),
    "n": (1,),
    "previous_response_id": (),
    "prompt": (),
    "response_format": (),
    "stop": (),
    "store": (),
    "top_logprobs": (),
    "truncation": ("disabled",),
}
LOGPROBS = "message.output_text.logprobs"


class ItemImage(Budgets):
    """detail and its neighbours: as in a chat's image_url."""

    type: Literal["input_image"]
    image_url: Url


def _part_tag(part: Any) -> str:
    return {"input_image": "#image", "refusal": "#refusal"}.get(str(kind_of(part)), "#text")


Part = Annotated[
    Annotated[TextPart, Tag("#text")] | Annotated[ItemImage, Tag("#image")] | Annotated[RefusalPart, Tag("#refusal")],
    Discriminator(_part_tag),
    of_kinds("a content part", *TEXTS, "input_image", "refusal"),
]


Content = Annotated[
    PlainText | Annotated[list[Part], Field(max_length=MAX_PARTS), Tag("#parts")], Discriminator(content_tag)
]
OutputPart = Annotated[
    Annotated[TextPart, Tag("#text")] | Annotated[ItemImage, Tag("#image")],
    Discriminator(_part_tag),
    of_kinds("an output part", *TEXTS, "input_image"),
]
Output = Annotated[
    PlainText | Annotated[list[OutputPart], Field(max_length=MAX_PARTS), Tag("#parts")], Discriminator(content_tag)
]


class ItemMessage(RequestModel):
    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class ItemCall(RequestModel):
    """A call that an earlier response made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class ItemCallOutput(RequestModel):
    type: Literal["function_call_output"]
    call_id: str
    output: Output


class ItemReasoning(RequestModel):
    """Of an earlier response: taken as it was sent, the model reads only answers."""

    type: Literal["reasoning"]


def _item_tag(item: Any) -> str:
    kind = str(kind_of(item))
    return f"#{kind}" if kind in ("function_call", "function_call_output", "reasoning") else "#message"


Item = Annotated[
    Annotated[ItemMessage, Tag("#message")]
    | Annotated[ItemCall, Tag("#function_call")]
    | Annotated[ItemCallOutput, Tag("#function_call_output")]
    | Annotated[ItemReasoning, Tag("#reasoning")],
    Discriminator(_item_tag),
    of_kinds("an input item", None, "message", "function_call", "function_call_output", "reasoning"),
]


class FunctionTool(RequestModel):
    """parameters: JSON schema of an object."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenFunction(NamedFunction):
    type: Literal["function"]


Choice = Annotated[
    Annotated[ChoiceWord, Tag("#word")] | Annotated[ChosenFunction, Tag("#function")], Discriminator(choice_tag)
]


class TextFormat(RequestModel):
    """schema: of the type json_schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextConfig(RequestModel):
    format: TextFormat | None = None


class ResponsesRequest(TranslatedRequest):
    NOT_SERVED = REFUSED

    input: Annotated[
        Annotated[str, Field(min_length=1), Tag("#string")]
        | Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS), Tag("#parts")],
        Discriminator(content_tag),
    ]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=SAMPLING_BOUNDS["temperature"][1])] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    text: TextConfig | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    include: Annotated[list[str], Field(max_length=16)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None

    @model_validator(mode="after")
    def _check(self) -> ResponsesRequest:
        if LOGPROBS in (self.include or ()):
            message = "log-probabilities are told by /v1/chat/completions; include cannot ask for them here"
            raise UserError(message, code="unsupported_field", param="include")
        return self


class OutputItem(TypedDict):
    """A message, a function_call or a reasoning, with the fields of its type."""

    type: Literal["message", "function_call", "reasoning"]
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[list[dict[str, Any]]]
    summary: NotRequired[list[dict[str, Any]]]
    call_id: NotRequired[str]
    name: NotRequired[str]
    arguments: NotRequired[str]


class ResponseFailure(TypedDict):
    code: str
    message: str


class IncompleteDetails(TypedDict):
    reason: Literal["max_output_tokens"]


class ResponseReply(TypedDict):
    """store: nothing is."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"]
    usage: InputUsage | None
