"""What a chat's and a completion's request have in common: how an answer is made, and what it has to match."""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from siglane.errors import UserError
from siglane.server.constraints import AskedConstraint, ResponseFormat, StructuredOutputs, asked_constraint
from siglane.server.fields import WHOLE, LogitBias, RequestModel, StopStrings, needs, not_both
from siglane.server.refused import refuse_fields
from siglane.types import SAMPLING_BOUNDS, Constraint, SamplingParams

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
CacheSalt = Annotated[str, Field(max_length=MAX_SALT_CHARACTERS)]


class StreamOptions(RequestModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(RequestModel):
    """Null means absent. prompt_field: what holds the prompt."""

    prompt_field: ClassVar[str]
    model_config = ConfigDict(
        json_schema_extra=needs(stream_options="stream") | not_both("response_format", "structured_outputs")
    )

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
    cache_salt: CacheSalt | None = None
    include_timings: bool | None = None

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
