"""What clients send: OpenAI's chat completions, with the fields of vLLM and SGLang that mean something here.

Every bound is checked here, before anything is allocated for the request. A field is honoured, or refused with a 400
that names it (`REFUSED`), or reported back as ignored (`ignored_fields`); none is dropped in silence.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from siglane.errors import UserError
from siglane.server.fields import LogitBias, StopStrings, TemplateKwargs
from siglane.server.refused import has_no_effect, refuse_fields
from siglane.types import SAMPLING_BOUNDS, Detail, SamplingParams

MAX_MESSAGES = 2048
MAX_PARTS = 1024
MAX_CHOICES = 8
MAX_STOP_IDS = 256
MAX_TOP_LOGPROBS = 20
MAX_SALT_CHARACTERS = 256
MAX_REPORTED_FIELDS = 20
MAX_LIMIT = (1 << 32) - 1
MAX_PINPOINTS = 256
MAX_PINPOINT_SIDE = 1 << 14


class RequestModel(BaseModel):
    # strict: true is not 1 and "1" is not 1; extra: unknown fields are reported, see ignored_fields
    model_config = ConfigDict(strict=True, extra="allow")


def plain(value: Any) -> Any:
    """A validated model as dictionaries and lists; without nulls, and without the fields that have no effect."""
    if isinstance(value, RequestModel):
        fields = ((name, getattr(value, name)) for name in type(value).model_fields)
        return {name: plain(found) for name, found in fields if found is not None}
    return [plain(item) for item in value] if isinstance(value, list) else value


Limit = Annotated[int, Field(ge=1, le=MAX_LIMIT)]
Side = Annotated[int, Field(ge=1, le=MAX_PINPOINT_SIDE)]
Pinpoint = Annotated[list[Side], Field(min_length=2, max_length=2)]  # height, width


class ImageUrl(RequestModel):
    """A URL beside the fields of `ImageBudget`: wishes, which the server lowers to its own limits."""

    url: str
    detail: Detail | None = None
    max_pixels: Limit | None = None
    min_pixels: Limit | None = None
    max_num_patches: Limit | None = None
    max_tiles: Limit | None = None
    grid_pinpoints: Annotated[list[Pinpoint], Field(min_length=1, max_length=MAX_PINPOINTS)] | None = None


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


PART_TAGS = {"image_url": "#image_url", "video_url": "#video_url", "refusal": "#refusal"}
PART_TAGS |= dict.fromkeys(("text", "input_text", "output_text"), "#text")


def _part_tag(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return PART_TAGS.get(str(kind), "#text")


def _check_part_type(part: Any) -> Any:
    if isinstance(part, dict) and (not isinstance(kind := part.get("type"), str) or kind not in PART_TAGS):
        message = "a content part must be of type 'text', 'image_url' or 'video_url'; no other content is read"
        raise UserError(message, code="unsupported_content_type")
    return part


ContentPart = Annotated[
    Annotated[TextPart, Tag("#text")]
    | Annotated[RefusalPart, Tag("#refusal")]
    | Annotated[ImageUrlPart, Tag("#image_url")]
    | Annotated[VideoUrlPart, Tag("#video_url")],
    Discriminator(_part_tag),
    BeforeValidator(_check_part_type),
]
Content = Annotated[
    Annotated[str, Tag("#string")] | Annotated[list[ContentPart], Field(max_length=MAX_PARTS), Tag("#parts")],
    Discriminator(lambda content: "#parts" if isinstance(content, list) else "#string"),
]


class ChatMessage(RequestModel):
    """A turn of the operator or the user."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content

    @model_validator(mode="after")
    def _check(self) -> ChatMessage:
        if self.content == []:
            raise UserError("at least one content part is needed", code="invalid_value", param="content")
        if self.role == "user" and self.content == "":
            raise UserError("the content of a user message must not be empty", code="empty_content")
        _check_parts(self.role, self.content)
        return self


class FunctionCall(RequestModel):
    name: str
    arguments: str


class ToolCall(RequestModel):
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


class AssistantMessage(RequestModel):
    """An earlier answer, as clients send it back. reasoning_content: accepted as it was sent, the model reads only
    answers; function_call: the older form of tool_calls."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_PARTS)] | None = None
    function_call: FunctionCall | None = None
    audio: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> AssistantMessage:
        _check_parts(self.role, self.content or "")
        return self


class ToolMessage(RequestModel):
    """What a tool answered; function: the older form of tool."""

    role: Literal["tool", "function"]
    content: Content | None
    tool_call_id: str | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _check(self) -> ToolMessage:
        _check_parts(self.role, self.content or "")
        return self


def _check_parts(role: str, content: str | Sequence[RequestModel]) -> None:
    """UserError for parts that other roles have."""
    if role != "user" and any(isinstance(part, ImageUrlPart | VideoUrlPart) for part in content):
        raise UserError("images and videos are accepted in user messages only", code="unsupported_content_type")
    if role != "assistant" and any(isinstance(part, RefusalPart) for part in content):
        raise UserError("refusals are accepted in assistant messages only", code="unsupported_content_type")


def _message_tag(message: Any) -> str:
    role = message.get("role") if isinstance(message, dict) else getattr(message, "role", None)
    return {"assistant": "#assistant", "tool": "#tool", "function": "#tool"}.get(str(role), "#message")


AnyMessage = Annotated[
    Annotated[ChatMessage, Tag("#message")]
    | Annotated[AssistantMessage, Tag("#assistant")]
    | Annotated[ToolMessage, Tag("#tool")],
    Discriminator(_message_tag),
]


def _bounds(name: str) -> Any:
    low, high = SAMPLING_BOUNDS[name]
    return Field(ge=low, le=None if math.isinf(high) else high)


class StreamOptions(RequestModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ChatCompletionRequest(RequestModel):
    """Null means absent."""

    model: str | None = None
    messages: Annotated[list[AnyMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, _bounds("max_tokens")] | None = None
    max_completion_tokens: Annotated[int, _bounds("max_tokens")] | None = None
    min_tokens: Annotated[int, _bounds("min_tokens")] | None = None
    ignore_eos: bool | None = None
    temperature: Annotated[float, _bounds("temperature")] | None = None
    top_p: Annotated[float, _bounds("top_p")] | None = None
    top_k: Annotated[int, _bounds("top_k")] | None = None
    min_p: Annotated[float, _bounds("min_p")] | None = None
    repetition_penalty: Annotated[float, _bounds("repetition_penalty")] | None = None
    frequency_penalty: Annotated[float, _bounds("frequency_penalty")] | None = None
    presence_penalty: Annotated[float, _bounds("presence_penalty")] | None = None
    logit_bias: LogitBias = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: StopStrings = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOP_IDS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    chat_template_kwargs: TemplateKwargs = None
    thinking_budget: Annotated[int, _bounds("thinking_budget")] | None = None
    thinking_token_budget: Annotated[int, _bounds("thinking_budget")] | None = None  # vLLM's name for it
    num_speculative_tokens: Annotated[int, _bounds("num_speculative_tokens")] | None = None
    cache_salt: Annotated[str, Field(max_length=MAX_SALT_CHARACTERS)] | None = None
    include_timings: bool | None = None

    @field_validator("messages", "stop_token_ids", mode="before")
    @classmethod
    def _check_length(cls, value: Any) -> Any:
        # before the items: a list of a million is refused for its length, not walked through
        if isinstance(value, list) and len(value) > MAX_MESSAGES:
            raise UserError(f"at most {MAX_MESSAGES} items are accepted", code="invalid_value")
        return value

    @model_validator(mode="after")
    def _check(self) -> ChatCompletionRequest:
        refuse_fields(self.model_extra or {})
        if self.stream_options is not None and not self.stream:
            message = "stream_options is only accepted together with stream"
            raise UserError(message, code="invalid_value", param="stream_options")
        if self.top_logprobs and not self.logprobs:
            message = "top_logprobs is only accepted together with logprobs"
            raise UserError(message, code="invalid_value", param="top_logprobs")
        if self.thinking_budget is not None and self.thinking_token_budget is not None:
            message = "thinking_budget and thinking_token_budget are the same; send one"
            raise UserError(message, code="invalid_value", param="thinking_token_budget")
        return self

    @property
    def requested_tokens(self) -> int | None:
        """The client's bound on generated tokens; the newer name wins."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields of `SamplingParams` that the client names."""
        fields = (field.name for field in dataclasses.fields(SamplingParams))
        named = {name: found for name in fields if (found := getattr(self, name)) is not None}
        named["logprobs"] = (self.top_logprobs or 0) if self.logprobs else None
        named["logit_bias"] = tuple((int(key), float(value)) for key, value in (self.logit_bias or {}).items())
        for name in ("stop", "stop_token_ids"):
            named[name] = tuple(named.get(name, ()))
        if self.requested_tokens is not None:
            named["max_tokens"] = self.requested_tokens
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
        for item in value if isinstance(value, list) else (value,):
            if isinstance(item, BaseModel):
                _collect_ignored(item, f"{prefix}{name}.", found)
