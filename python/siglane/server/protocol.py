"""What clients send: OpenAI's chat completions, with the fields of vLLM and SGLang that mean something here.

Every bound is checked here, before anything is allocated for the request. A field is honoured, or refused with a 400
that names it (`REFUSED`), or reported back as ignored (`ignored_fields`); none is dropped in silence.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from siglane.errors import UserError
from siglane.media.tools import read_tools
from siglane.server.constraints import AskedConstraint, asked_constraint
from siglane.server.fields import WHOLE, RequestModel, TemplateKwargs, Url, as_url, needs, not_both
from siglane.server.generation_fields import MAX_ITEMS, MAX_TOP_LOGPROBS, GenerationFields, bounds, of_length
from siglane.server.refused import has_no_effect, refuse_fields
from siglane.server.tool_fields import EarlierCall, FunctionCall, ToolChoice, Tools
from siglane.types import Constraint, Detail, SamplingParams, ToolUse

MAX_PARTS = 1024
MAX_REPORTED_FIELDS = 20
MAX_LIMIT = (1 << 32) - 1
MAX_PINPOINTS = 256
MAX_PINPOINT_SIDE = 1 << 14


def plain(value: Any) -> Any:
    """A validated model as dictionaries and lists; without nulls, and without the fields that have no effect."""
    if isinstance(value, RequestModel):
        fields = ((name, getattr(value, name)) for name in type(value).model_fields)
        return {name: plain(found) for name, found in fields if found is not None}
    return [plain(item) for item in value] if isinstance(value, list) else value


Limit = Annotated[int, Field(ge=1, le=MAX_LIMIT), WHOLE]
Side = Annotated[int, Field(ge=1, le=MAX_PINPOINT_SIDE), WHOLE]
Pinpoint = Annotated[list[Side], Field(min_length=2, max_length=2)]  # height, width


class Budgets(RequestModel):
    """The fields of `ImageBudget`: wishes, which the server lowers to its own limits."""

    detail: Detail | None = None
    max_pixels: Limit | None = None
    min_pixels: Limit | None = None
    max_num_patches: Limit | None = None
    max_tiles: Limit | None = None
    grid_pinpoints: Annotated[list[Pinpoint], Field(min_length=1, max_length=MAX_PINPOINTS)] | None = None


class ImageUrl(Budgets):
    url: Url


UrlOrImage = Annotated[ImageUrl, BeforeValidator(as_url, json_schema_input_type=Url | ImageUrl)]


class VideoUrl(ImageUrl):
    num_frames: Limit | None = None


class TextPart(RequestModel):
    """The last two types are the Responses API's names for it."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class RefusalPart(RequestModel):
    """What an earlier answer refused with: the model reads it as that answer's text."""

    type: Literal["refusal"]
    refusal: str


class ImageUrlPart(RequestModel):
    type: Literal["image_url"]
    image_url: ImageUrl


class VideoUrlPart(RequestModel):
    type: Literal["video_url"]
    video_url: VideoUrl


TEXTS = ("text", "input_text", "output_text")
PART_TAGS = {"image_url": "#image_url", "video_url": "#video_url", "refusal": "#refusal"} | dict.fromkeys(
    TEXTS, "#text"
)
OTHERS = {"refusal": "refusals are accepted in assistant messages only"}
OTHERS |= dict.fromkeys(("image_url", "video_url"), "images and videos are accepted in messages of users and tools")


def kind_of(value: Any) -> Any:
    """The type that a part of a request states, before and after it has become a model."""
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


def part_tag(part: Any) -> str:
    return PART_TAGS.get(str(kind_of(part)), "#text")


def of_types(*kinds: str, others: Mapping[str, str] = OTHERS) -> BeforeValidator:
    """UserError for a part of another type than `kinds`, before its fields are looked at; others: what to say of it."""

    def check(part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, dict) and kind not in kinds:
            known = others.get(kind) if isinstance(kind, str) else None
            message = "a content part must be of type 'text', 'image_url' or 'video_url'; no other content is read"
            raise UserError(known or message, code="unsupported_content_type")
        return part

    return BeforeValidator(check)


def content_tag(content: Any) -> str:
    return "#parts" if isinstance(content, list) else "#string"


def _no_content(content: Any) -> Any:
    if content == "":
        raise UserError("the content of a user message must not be empty", code="empty_content")
    return content


Parts = Field(min_length=1, max_length=MAX_PARTS)
UserPart = Annotated[
    Annotated[TextPart, Tag("#text")]
    | Annotated[ImageUrlPart, Tag("#image_url")]
    | Annotated[VideoUrlPart, Tag("#video_url")],
    Discriminator(part_tag),
    of_types(*TEXTS, "image_url", "video_url"),
]
AnswerPart = Annotated[
    Annotated[TextPart, Tag("#text")] | Annotated[RefusalPart, Tag("#refusal")],
    Discriminator(part_tag),
    of_types(*TEXTS, "refusal"),
]
PlainText = Annotated[str, Tag("#string")]
UserContent = Annotated[
    Annotated[str, Field(min_length=1), Tag("#string")] | Annotated[list[UserPart], Parts, Tag("#parts")],
    Discriminator(content_tag),
    BeforeValidator(_no_content),
]
AnswerContent = Annotated[
    PlainText | Annotated[list[AnswerPart], Field(max_length=MAX_PARTS), Tag("#parts")], Discriminator(content_tag)
]
ToolContent = Annotated[PlainText | Annotated[list[UserPart], Parts, Tag("#parts")], Discriminator(content_tag)]
TextContent = Annotated[
    PlainText | Annotated[list[Annotated[TextPart, of_types(*TEXTS)]], Parts, Tag("#parts")], Discriminator(content_tag)
]


class SystemMessage(RequestModel):
    """What the operator says."""

    role: Literal["system", "developer"]
    content: TextContent


class UserMessage(RequestModel):
    role: Literal["user"]
    content: UserContent


class AssistantMessage(RequestModel):
    """An earlier answer, as clients send it back. reasoning_content: accepted as it was sent, the model reads only
    answers; function_call: the older form of tool_calls."""

    role: Literal["assistant"]
    content: AnswerContent | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[EarlierCall], Field(max_length=MAX_PARTS)] | None = None
    function_call: FunctionCall | None = None
    audio: dict[str, Any] | None = None


class ToolMessage(RequestModel):
    """What a tool answered, pictures too; function: the older form of tool."""

    role: Literal["tool", "function"]
    content: ToolContent | None
    tool_call_id: str | None = None
    name: str | None = None


MESSAGE_TAGS = dict.fromkeys(("system", "developer"), "#system") | dict.fromkeys(("tool", "function"), "#tool")
MESSAGE_TAGS |= {"user": "#user", "assistant": "#assistant"}


def _message_tag(message: Any) -> str:
    role = message.get("role") if isinstance(message, dict) else getattr(message, "role", None)
    return MESSAGE_TAGS.get(str(role), "#user")


def _check_role(message: Any) -> Any:
    if isinstance(message, dict) and "role" in message and str(message["role"]) not in MESSAGE_TAGS:
        raise UserError(f"must be one of {', '.join(MESSAGE_TAGS)}", code="invalid_value", param="role")
    return message


AnyMessage = Annotated[
    Annotated[SystemMessage, Tag("#system")]
    | Annotated[UserMessage, Tag("#user")]
    | Annotated[AssistantMessage, Tag("#assistant")]
    | Annotated[ToolMessage, Tag("#tool")],
    Discriminator(_message_tag),
    BeforeValidator(_check_role),
]


Messages = Annotated[list[AnyMessage], Field(min_length=1, max_length=MAX_ITEMS), BeforeValidator(of_length)]


class GenerationRequest(GenerationFields):
    """What a chat's and a completion's request say alike. prompt_field: what holds the prompt."""

    prompt_field: ClassVar[str]
    model_config = ConfigDict(
        json_schema_extra=needs(stream_options="stream") | not_both("response_format", "structured_outputs")
    )

    @model_validator(mode="after")
    def _check_generation(self) -> GenerationRequest:
        refuse_fields(self.model_extra or {})
        if self.stream_options is not None and not self.stream:
            message = "stream_options is only accepted together with stream"
            raise UserError(message, code="invalid_value", param="stream_options")
        _ = self.asked_constraint
        return self

    @cached_property
    def asked_constraint(self) -> AskedConstraint | None:
        """What the text of an answer has to match."""
        return asked_constraint(self.response_format, self.structured_outputs, self.model_extra or {})

    @property
    def constraint(self) -> Constraint | None:
        return None if (asked := self.asked_constraint) is None else asked.constraint

    @property
    def requested_tokens(self) -> int | None:
        """The client's bound on generated tokens."""
        return self.max_tokens

    @property
    def tokens_field(self) -> str:
        """What holds it."""
        return "max_tokens"

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields of `SamplingParams` that the client names."""
        known = {*type(self).model_fields, "constraint"}
        fields = (field.name for field in dataclasses.fields(SamplingParams) if field.name in known)
        named = {name: found for name in fields if (found := getattr(self, name)) is not None}
        named["logit_bias"] = tuple((int(key), float(value)) for key, value in (self.logit_bias or {}).items())
        for name in ("stop", "stop_token_ids"):
            named[name] = tuple(named.get(name, ()))
        if self.requested_tokens is not None:
            named["max_tokens"] = self.requested_tokens
        return named


class ChatCompletionRequest(GenerationRequest):
    prompt_field = "messages"
    model_config = ConfigDict(
        json_schema_extra=needs(stream_options="stream", top_logprobs="logprobs")
        | not_both("response_format", "structured_outputs")
    )

    messages: Messages
    max_completion_tokens: Annotated[int, bounds("max_tokens"), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), WHOLE] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateKwargs = None
    thinking_budget: Annotated[int, bounds("thinking_budget"), WHOLE] | None = None
    thinking_token_budget: Annotated[int, bounds("thinking_budget"), WHOLE] | None = None  # vLLM's name for it

    @model_validator(mode="after")
    def _check(self) -> ChatCompletionRequest:
        _ = self.tool_use
        if self.top_logprobs and not self.logprobs:
            message = "top_logprobs is only accepted together with logprobs"
            raise UserError(message, code="invalid_value", param="top_logprobs")
        if self.thinking_budget is not None and self.thinking_token_budget is not None:
            message = "thinking_budget and thinking_token_budget are the same; send one"
            raise UserError(message, code="invalid_value", param="thinking_token_budget")
        return self

    @cached_property
    def tool_use(self) -> ToolUse | None:
        return read_tools(plain(self.tools), plain(self.tool_choice), self.parallel_tool_calls)

    @property
    def requested_tokens(self) -> int | None:
        """The client's bound on generated tokens; the newer name wins."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def tokens_field(self) -> str:
        return "max_completion_tokens" if self.max_completion_tokens is not None else "max_tokens"

    @property
    def sampling(self) -> dict[str, Any]:
        named = super().sampling
        named["logprobs"] = (self.top_logprobs or 0) if self.logprobs else None
        if self.thinking_token_budget is not None:
            named["thinking_budget"] = self.thinking_token_budget
        return named


def ignored_fields(model: BaseModel) -> list[str]:
    """Dotted names of the fields that were sent and have no effect, made safe for a header; at most 20."""
    found: dict[str, None] = {}
    _collect_ignored(model, "", found)
    return list(found)


def _collect_ignored(model: BaseModel, prefix: str, found: dict[str, None]) -> None:
    for name, value in (model.model_extra or {}).items():
        if (has_no_effect(name, value) if not prefix else value is not None) and len(found) < MAX_REPORTED_FIELDS:
            found[prefix + re.sub(r"[^A-Za-z0-9_-]", "?", name[:64])] = None
    for name in type(model).model_fields:
        value = getattr(model, name)
        several = value.values() if isinstance(value, dict) else value
        for item in several if isinstance(value, list | dict) else (value,):
            if isinstance(item, BaseModel):
                _collect_ignored(item, f"{prefix}{name}.", found)
