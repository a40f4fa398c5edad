"""What clients send and get: OpenAI's chat completions, with the fields of vLLM and SGLang that mean something here.

Every bound is checked here, before anything is allocated for the request. A field is honoured, or refused with a 400
that names it (`REFUSED`), or reported back as ignored (`ignored_fields`); none is dropped in silence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator
from typing_extensions import TypedDict  # pydantic reads no other on Python 3.11

from siglane.errors import UserError
from siglane.families.report import ImageReport
from siglane.tiling.rule import LIMITS, ImageBudget
from siglane.types import Detail

MAX_MESSAGES = 2048
MAX_PARTS = 1024
MAX_CHOICES = 8
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_STOP_IDS = 256
MAX_LOGIT_BIAS = 1024
MAX_TOP_LOGPROBS = 20
MAX_SALT_CHARACTERS = 256
MAX_TEMPLATE_KWARGS = 16
MAX_REPORTED_FIELDS = 20
MAX_LIMIT = (1 << 32) - 1
MAX_PINPOINTS = 256
MAX_PINPOINT_SIDE = 1 << 14

# Fields that change the answer in other servers and are not served here, with the values that ask for nothing.
# None, False and empty values ask for nothing in any of them.
REFUSED: Mapping[str, tuple[object, ...]] = {
    "add_generation_prompt": (True,),
    "audio": (),
    "bad_words": (),
    "beam_width": (1,),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (),
    "custom_logit_processor": (),
    "documents": (),
    "ebnf": (),
    "echo": (),
    "function_call": ("none", "auto"),
    "functions": (),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "input_ids": (),
    "json_schema": (),
    "logits_processors": (),
    "lora_path": (),
    "media_io_kwargs": (),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "regex": (),
    "response_format": ({"type": "text"},),
    "stop_regex": (),
    "structural_tag": (),
    "structured_outputs": (),
    "suffix": (),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (),
    "web_search_options": (),
}
_REFUSED_IN_MESSAGES = ("audio", "function_call", "tool_call_id", "tool_calls")

FinishReason = Literal["stop", "length"]
TemplateValue = str | int | float | bool | None


class RequestModel(BaseModel):
    # strict: true is not 1 and "1" is not 1; extra: unknown fields are reported, see ignored_fields
    model_config = ConfigDict(strict=True, extra="allow")


Limit = Annotated[int, Field(ge=1, le=MAX_LIMIT)]
Side = Annotated[int, Field(ge=1, le=MAX_PINPOINT_SIDE)]
Pinpoint = Annotated[list[Side], Field(min_length=2, max_length=2)]  # height, width


class _Budgeted(RequestModel):
    """The fields of `ImageBudget` beside a URL: wishes, which the server lowers to its own budget."""

    url: str
    detail: Detail | None = None
    max_pixels: Limit | None = None
    min_pixels: Limit | None = None
    max_num_patches: Limit | None = None
    max_tiles: Limit | None = None
    grid_pinpoints: Annotated[list[Pinpoint], Field(min_length=1, max_length=MAX_PINPOINTS)] | None = None

    @property
    def image_limits(self) -> ImageBudget:
        limits = {name: value for name in LIMITS[:-1] if (value := getattr(self, name)) is not None}
        pinpoints = None
        if self.grid_pinpoints is not None:
            pinpoints = tuple((height, width) for height, width in self.grid_pinpoints)
        return ImageBudget(detail=self.detail or "auto", grid_pinpoints=pinpoints, **limits)


class ImageUrl(_Budgeted):
    pass


class VideoUrl(_Budgeted):
    num_frames: Limit | None = None


class TextPart(RequestModel):
    type: Literal["text"]
    text: str


class ImageUrlPart(RequestModel):
    type: Literal["image_url"]
    image_url: ImageUrl


class VideoUrlPart(RequestModel):
    type: Literal["video_url"]
    video_url: VideoUrl


def _part_tag(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return f"#{kind}" if kind in ("image_url", "video_url") else "#text"


def _check_part_type(part: Any) -> Any:
    if isinstance(part, dict) and part.get("type") not in ("text", "image_url", "video_url"):
        message = "a content part must be of type 'text', 'image_url' or 'video_url'; no other content is read"
        raise UserError(message, code="unsupported_content_type")
    return part


ContentPart = Annotated[
    Annotated[TextPart, Tag("#text")]
    | Annotated[ImageUrlPart, Tag("#image_url")]
    | Annotated[VideoUrlPart, Tag("#video_url")],
    Discriminator(_part_tag),
    BeforeValidator(_check_part_type),
]
Content = Annotated[
    Annotated[str, Tag("#string")]
    | Annotated[list[ContentPart], Field(min_length=1, max_length=MAX_PARTS), Tag("#parts")],
    Discriminator(lambda content: "#parts" if isinstance(content, list) else "#string"),
]


class ChatMessage(RequestModel):
    """reasoning_content: of an earlier answer; accepted as it was sent, the model reads only answers."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _check(self) -> ChatMessage:
        refuse_fields(self.model_extra or {}, dict.fromkeys(_REFUSED_IN_MESSAGES, ()))
        if self.role == "user" and self.content == "":
            raise UserError("the content of a user message must not be empty", code="empty_content")
        if self.role != "user" and any(isinstance(part, ImageUrlPart | VideoUrlPart) for part in self.content):
            raise UserError("images and videos are accepted in user messages only", code="unsupported_content_type")
        return self


class StreamOptions(RequestModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ChatCompletionRequest(RequestModel):
    """Null means absent. The bounds of the sampling fields keep float32 logits finite."""

    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Any] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOP_IDS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    thinking_budget: Annotated[int, Field(ge=1)] | None = None
    thinking_token_budget: Annotated[int, Field(ge=1)] | None = None  # vLLM's name for it
    cache_salt: Annotated[str, Field(max_length=MAX_SALT_CHARACTERS)] | None = None
    include_timings: bool | None = None

    @field_validator("messages", "stop_token_ids", mode="before")
    @classmethod
    def _check_length(cls, value: Any) -> Any:
        # before the items: a list of a million is refused for its length, not walked through
        if isinstance(value, list) and len(value) > MAX_MESSAGES:
            raise UserError(f"at most {MAX_MESSAGES} items are accepted", code="invalid_value")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _check_stop(cls, value: Any) -> Any:
        stops = [value] if isinstance(value, str) else value
        if stops is None:
            return None
        if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(stop, str) for stop in stops):
            raise UserError(f"stop must be a string or a list of at most {MAX_STOPS} strings", code="invalid_value")
        if not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
            message = f"a stop string has between 1 and {MAX_STOP_CHARACTERS} characters"
            raise UserError(message, code="invalid_value")
        return stops

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _check_logit_bias(cls, value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIAS:
            message = f"logit_bias must be an object of at most {MAX_LOGIT_BIAS} token ids"
            raise UserError(message, code="invalid_value")
        for key, bias in value.items():
            if not re.fullmatch(r"[0-9]{1,9}", key) or isinstance(bias, bool) or not isinstance(bias, int | float):
                raise UserError("logit_bias must map token ids to numbers", code="invalid_value")
            if not -100 <= bias <= 100:
                raise UserError("a logit bias must be between -100 and 100", code="invalid_value")
        return value

    @field_validator("chat_template_kwargs", mode="before")
    @classmethod
    def _check_template_kwargs(cls, value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, dict) or len(value) > MAX_TEMPLATE_KWARGS:
            message = f"chat_template_kwargs must be an object of at most {MAX_TEMPLATE_KWARGS} values"
            raise UserError(message, code="invalid_value")
        if not all(name.isidentifier() for name in value):
            raise UserError("the names in chat_template_kwargs must be identifiers", code="invalid_value")
        if not all(item is None or isinstance(item, TemplateValue) for item in value.values()):
            raise UserError("the values in chat_template_kwargs must be plain", code="invalid_value")
        return value

    @model_validator(mode="after")
    def _check(self) -> ChatCompletionRequest:
        refuse_fields(self.model_extra or {}, REFUSED)
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
    def choices(self) -> int:
        return self.n or 1

    @property
    def requested_tokens(self) -> int | None:
        """The client's bound on generated tokens; the newer name wins."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def most_thinking(self) -> int | None:
        """The client's bound on tokens of thinking, under either of its names."""
        return self.thinking_budget if self.thinking_budget is not None else self.thinking_token_budget

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(self.stop or ())


def refuse_fields(extra: Mapping[str, Any], refused: Mapping[str, tuple[object, ...]]) -> None:
    for name, value in extra.items():
        if name in refused and value and value not in refused[name]:
            raise UserError(f"{name} is not supported by this server", code="unsupported_field", param=name)


def ignored_fields(model: BaseModel) -> list[str]:
    """Dotted names of the fields that were sent and have no effect, made safe for a header; at most 20."""
    found: dict[str, None] = {}
    _collect_ignored(model, "", found)
    return list(found)


def _collect_ignored(model: BaseModel, prefix: str, found: dict[str, None]) -> None:
    for name, value in (model.model_extra or {}).items():
        if value is not None and name not in REFUSED and len(found) < MAX_REPORTED_FIELDS:
            found[prefix + re.sub(r"[^A-Za-z0-9_-]", "?", name[:64])] = None
    for name in type(model).model_fields:
        value = getattr(model, name)
        for item in value if isinstance(value, list) else (value,):
            if isinstance(item, BaseModel):
                _collect_ignored(item, f"{prefix}{name}.", found)


class PromptTokensDetails(TypedDict):
    cached_tokens: int
    image_tokens: int
    text_tokens: int


class CompletionTokensDetails(TypedDict):
    reasoning_tokens: int


class UsageReply(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobReply(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(TypedDict):
    content: list[TokenLogprobReply]
    refusal: None


class SiglaneReport(TypedDict):
    """What other servers do not tell. timings: seconds by stage, when the request asked for them."""

    images: list[ImageReport]
    timings: NotRequired[dict[str, float]]


class AssistantMessage(TypedDict):
    """reasoning_content: of models that reason, null where this answer has none."""

    role: Literal["assistant"]
    content: str
    refusal: None
    reasoning_content: NotRequired[str | None]


class Choice(TypedDict):
    index: int
    message: AssistantMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason
    matched_stop: str | int | None


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: UsageReply
    siglane: SiglaneReport


class Delta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    reasoning_content: NotRequired[str]


class ChunkChoice(TypedDict):
    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason | None
    matched_stop: NotRequired[str | int | None]


class ChatCompletionChunk(TypedDict):
    """One event of a stream. usage: null until the last chunk when it was asked for, else absent."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: NotRequired[UsageReply | None]
    siglane: NotRequired[SiglaneReport]


class ModelCard(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelCard]
