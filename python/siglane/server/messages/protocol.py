"""What clients send to and get from /v1/messages: Anthropic's Messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Discriminator, Field, Tag, model_validator
from typing_extensions import TypedDict  # pydantic reads no other on Python 3.11

from siglane.errors import UserError
from siglane.media.tools import MOST_TOOLS, NAME
from siglane.server.fields import WHOLE, RequestModel, StopStrings, Url, of_kinds
from siglane.server.protocol import MAX_PARTS, PlainText, content_tag, kind_of
from siglane.server.refused import TranslatedRequest
from siglane.types import SAMPLING_BOUNDS

MAX_MESSAGES = 2048
# what is served elsewhere, or by nobody here, with the values that ask for nothing
REFUSED: Mapping[str, tuple[object, ...]] = {
    "container": (),
    "context_management": (),
    "logprobs": (),
    "max_completion_tokens": (),
    "mcp_servers": (),
    "n": (1,),
    "parallel_tool_calls": (True,),
    "response_format": (),
    "stop": (),
    "top_logprobs": (),
}


class TextBlock(RequestModel):
    type: Literal["text"]
    text: str


class Base64Source(RequestModel):
    """media_type: the format is read from the bytes."""

    type: Literal["base64"]
    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"] | None = None
    data: str


class UrlSource(RequestModel):
    type: Literal["url"]
    url: Url


def _tagged(otherwise: str, *others: str) -> Discriminator:
    """By their type; what has none is read as `otherwise`, so that it is told what it lacks."""
    known = {name: name for name in others} | ({"redacted_thinking": "thinking"} if "thinking" in others else {})
    return Discriminator(lambda value: f"#{known.get(str(kind_of(value)), otherwise)}")


Source = Annotated[
    Annotated[Base64Source, Tag("#base64")] | Annotated[UrlSource, Tag("#url")],
    _tagged("base64", "url"),
    of_kinds("an image's source", "base64", "url"),
]


class ImageBlock(RequestModel):
    type: Literal["image"]
    source: Source


class ToolUseBlock(RequestModel):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


OnlyText = Annotated[TextBlock, of_kinds("a block here", "text")]
Texts = Annotated[
    PlainText | Annotated[list[OnlyText], Field(min_length=1, max_length=MAX_PARTS), Tag("#parts")],
    Discriminator(content_tag),
]

ToolContentBlock = Annotated[
    Annotated[TextBlock, Tag("#text")] | Annotated[ImageBlock, Tag("#image")],
    _tagged("text", "image"),
    of_kinds("a tool's block", "text", "image"),
]
ToolContent = Annotated[
    PlainText | Annotated[list[ToolContentBlock], Field(min_length=1, max_length=MAX_PARTS), Tag("#parts")],
    Discriminator(content_tag),
]


class ToolResultBlock(RequestModel):
    type: Literal["tool_result"]
    tool_use_id: str
    content: ToolContent | None = None
    is_error: bool | None = None


class ThinkingBlock(RequestModel):
    """Of an earlier answer: taken as it was sent, the model reads only answers."""

    type: Literal["thinking", "redacted_thinking"]


UserBlock = Annotated[
    Annotated[TextBlock, Tag("#text")]
    | Annotated[ImageBlock, Tag("#image")]
    | Annotated[ToolResultBlock, Tag("#tool_result")],
    _tagged("text", "image", "tool_result"),
    of_kinds("a user's block", "text", "image", "tool_result"),
]
AnswerBlock = Annotated[
    Annotated[TextBlock, Tag("#text")]
    | Annotated[ToolUseBlock, Tag("#tool_use")]
    | Annotated[ThinkingBlock, Tag("#thinking")],
    _tagged("text", "tool_use", "thinking"),
    of_kinds("an answer's block", "text", "tool_use", "thinking", "redacted_thinking"),
]


class UserTurn(RequestModel):
    role: Literal["user"]
    content: Annotated[
        Annotated[str, Field(min_length=1), Tag("#string")]
        | Annotated[list[UserBlock], Field(min_length=1, max_length=MAX_PARTS), Tag("#parts")],
        Discriminator(content_tag),
    ]


class AnswerTurn(RequestModel):
    role: Literal["assistant"]
    content: Annotated[
        PlainText | Annotated[list[AnswerBlock], Field(max_length=MAX_PARTS), Tag("#parts")], Discriminator(content_tag)
    ]


class SystemTurn(RequestModel):
    role: Literal["system"]
    content: Texts


def _role_tag(turn: Any) -> str:
    role = turn.get("role") if isinstance(turn, dict) else getattr(turn, "role", None)
    return f"#{role}" if role in ("assistant", "system") else "#user"


Turn = Annotated[
    Annotated[UserTurn, Tag("#user")]
    | Annotated[AnswerTurn, Tag("#assistant")]
    | Annotated[SystemTurn, Tag("#system")],
    Discriminator(_role_tag),
]


class CustomTool(RequestModel):
    """input_schema: JSON schema of an object."""

    type: Literal["custom"] | None = None
    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class ToolChoice(RequestModel):
    """name: with the type `tool`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(RequestModel):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None


class JsonFormat(RequestModel):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(RequestModel):
    format: JsonFormat | None = None


class CountRequest(TranslatedRequest):
    NOT_SERVED = REFUSED

    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: Texts | None = None
    tools: Annotated[list[CustomTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> CountRequest:
        if self.messages[-1].role == "assistant":
            message = "the last message is the assistant's, and answers cannot be begun for it"
            raise UserError(message, code="unsupported_field", param=f"messages[{len(self.messages) - 1}].role")
        if self.tool_choice is not None and (self.tool_choice.name is None) == (self.tool_choice.type == "tool"):
            message = "name belongs to the type 'tool', which needs it"
            raise UserError(message, code="invalid_value", param="tool_choice.name")
        return self


class MessagesRequest(CountRequest):
    max_tokens: Annotated[int, Field(ge=1), WHOLE]
    stream: bool | None = None
    stop_sequences: StopStrings = None
    temperature: Annotated[float, Field(ge=0, le=SAMPLING_BOUNDS["temperature"][1])] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0), WHOLE] | None = None


class MessageUsage(TypedDict):
    """input_tokens: of those that were not cached."""

    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens: int


class ReplyBlock(TypedDict):
    """A text, a thinking or a tool_use, with the fields of its type."""

    type: Literal["text", "thinking", "tool_use"]
    text: NotRequired[str]
    thinking: NotRequired[str]
    signature: NotRequired[str]
    id: NotRequired[str]
    name: NotRequired[str]
    input: NotRequired[dict[str, Any]]


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessageReply(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ReplyBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class InputTokens(TypedDict):
    input_tokens: int


class AnthropicError(TypedDict):
    """code, param: as in OpenAI's errors."""

    type: str
    message: str
    code: str
    param: str | None


class AnthropicFailure(TypedDict):
    """What a failed request answers, and the last event of a stream that failed."""

    type: Literal["error"]
    error: AnthropicError
    request_id: str | None
