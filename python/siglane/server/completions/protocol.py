"""What clients of `/v1/completions` send and get: OpenAI's legacy completions, with a chat's fields of sampling."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Discriminator, Field, Tag, model_validator
from typing_extensions import TypedDict  # pydantic reads no other on Python 3.11

from siglane.errors import UserError
from siglane.server.fields import WHOLE
from siglane.server.generation_fields import MAX_TOP_LOGPROBS, TokenId, prompt_tag
from siglane.server.protocol import GenerationRequest
from siglane.server.replies import FinishReason, ReplyPiece, WholeReply

MAX_PROMPTS = 64
MAX_IDS = 1 << 20
DEFAULT_TOKENS = 16  # as OpenAI's


Ids = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_IDS)]
Text = Annotated[str, Field(min_length=1)]
Prompts = Annotated[
    Annotated[Text, Tag("#text")]
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS), Tag("#texts")]
    | Annotated[Ids, Tag("#ids")]
    | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS), Tag("#lists")],
    Discriminator(prompt_tag),
]


class CompletionRequest(GenerationRequest):
    """prompt: a text, token ids, or a list of either; echo: whether the text begins with the prompt; logprobs: of how
    many of the likeliest tokens, with echo also of the prompt's."""

    prompt_field = "prompt"

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0), WHOLE] | None = None  # 0: with echo
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), WHOLE] | None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            message = "max_tokens 0 generates nothing; with echo it tells of the prompt"
            raise UserError(message, code="invalid_value", param="max_tokens")
        if len(self.prompts) * (self.n or 1) > MAX_PROMPTS:
            message = f"{len(self.prompts)} prompts with {self.n} choices each; at most {MAX_PROMPTS} texts are written"
            raise UserError(message, code="invalid_value", param="prompt")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        one = not isinstance(self.prompt, list) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt  # type: ignore[return-value]

    @property
    def sampling(self) -> dict[str, Any]:
        return {**super().sampling, "max_tokens": self.max_tokens or DEFAULT_TOKENS, "logprobs": self.logprobs}


class LegacyLogprobs(TypedDict):
    """Columns with a row for each token: its text, its log-probability, those of the likeliest by text, and where it
    begins in the choice's text, in characters. The first token of an echoed prompt has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: FinishReason
    matched_stop: str | int | None


class Completion(WholeReply):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class CompletionChunkChoice(TypedDict):
    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: FinishReason | None
    matched_stop: NotRequired[str | int | None]


class CompletionChunk(ReplyPiece):
    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
