"""What clients get: OpenAI's chat completions, whole or in chunks, with `siglane`'s report beside them."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict  # pydantic reads no other on Python 3.11

from siglane.families.report import ImageReport

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(TypedDict):
    cached_tokens: int
    image_tokens: int
    text_tokens: int


class CompletionTokensDetails(TypedDict):
    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class UsageReply(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class InputDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(TypedDict):
    reasoning_tokens: int


class InputUsage(TypedDict):
    """The same as OpenAI's newer APIs tell it."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


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
    """What other servers do not tell. timings: seconds by stage, when the request asked for them, by
    include_timings or the header x-siglane-timings."""

    images: list[ImageReport]
    timings: NotRequired[dict[str, float]]


class CalledFunction(TypedDict):
    """arguments: as the model wrote them, JSON."""

    name: str
    arguments: str


class ToolCallReply(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ReplyMessage(TypedDict):
    """content: null where the answer is nothing but calls; reasoning_content: of models that reason, null where this
    answer has none; tool_calls: where it has any."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str | None]
    tool_calls: NotRequired[list[ToolCallReply]]


class Choice(TypedDict):
    index: int
    message: ReplyMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason
    matched_stop: str | int | None


class Reply(TypedDict):
    """What every answer of a language model has, and every piece of one."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class WholeReply(Reply):
    usage: UsageReply
    siglane: SiglaneReport


class ReplyPiece(Reply):
    """One event of a stream. usage: null until the last one when it was asked for, else absent."""

    usage: NotRequired[UsageReply | None]
    siglane: NotRequired[SiglaneReport]


class ChatCompletion(WholeReply):
    object: Literal["chat.completion"]
    choices: list[Choice]


class FunctionDelta(TypedDict):
    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """id, type and name come with the first delta of the call with this index."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class Delta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDelta]]


class ChunkChoice(TypedDict):
    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason | None
    matched_stop: NotRequired[str | int | None]


class ChatCompletionChunk(ReplyPiece):
    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]


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


class Health(TypedDict):
    status: Literal["ok"]
    engine: Literal["starting", "ready"]


class Ready(TypedDict):
    status: Literal["ready"]
