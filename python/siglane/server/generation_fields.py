"""What a chat's and a completion's request have in common: how an answer is made, and what it has to match."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from siglane.errors import UserError
from siglane.server.constraints import ResponseFormat, StructuredOutputs
from siglane.server.fields import WHOLE, LogitBias, RequestModel, StopStrings
from siglane.types import SAMPLING_BOUNDS

MAX_ITEMS = 2048
MAX_CHOICES = 8
MAX_STOP_IDS = 256
MAX_TOP_LOGPROBS = 20
MAX_SALT_CHARACTERS = 256


def of_length(value: Any) -> Any:
    """Before the items: a list of a million is refused for its length, not walked through."""
    if isinstance(value, list) and len(value) > MAX_ITEMS:
        raise UserError(f"at most {MAX_ITEMS} items are accepted", code="invalid_value")
    return value


def bounds(name: str) -> Any:
    low, high = SAMPLING_BOUNDS[name]
    return Field(ge=low, le=None if math.isinf(high) else high)


TokenId = Annotated[int, Field(ge=0), WHOLE]


def prompt_tag(prompt: Any) -> str:
    """The tag of a text, several, token ids or lists of them in a union."""
    if not isinstance(prompt, list):
        return "#text"
    first = prompt[0] if prompt else None
    if isinstance(first, list):
        return "#lists"
    return "#ids" if isinstance(first, int | float) else "#texts"  # an integer beyond 64 bits comes as a float


CacheSalt = Annotated[str, Field(max_length=MAX_SALT_CHARACTERS)]


class StreamOptions(RequestModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationFields(RequestModel):
    """Null means absent."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = None
    max_tokens: Annotated[int, bounds("max_tokens"), WHOLE] | None = None
    min_tokens: Annotated[int, bounds("min_tokens"), WHOLE] | None = None
    ignore_eos: bool | None = None
    temperature: Annotated[float, bounds("temperature")] | None = None
    top_p: Annotated[float, bounds("top_p")] | None = None
    top_k: Annotated[int, bounds("top_k"), WHOLE] | None = None
    min_p: Annotated[float, bounds("min_p")] | None = None
    repetition_penalty: Annotated[float, bounds("repetition_penalty")] | None = None
    frequency_penalty: Annotated[float, bounds("frequency_penalty")] | None = None
    presence_penalty: Annotated[float, bounds("presence_penalty")] | None = None
    logit_bias: LogitBias = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63), WHOLE] | None = None
    stop: StopStrings = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_IDS), BeforeValidator(of_length)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    num_speculative_tokens: Annotated[int, bounds("num_speculative_tokens"), WHOLE] | None = None
    skip_special_tokens: bool | None = None
    cache_salt: CacheSalt | None = None
    include_timings: bool | None = None
