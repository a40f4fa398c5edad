"""One generation: how tokens are chosen, what is asked of the engine and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from siglane.types.image import ImagePatches
from siglane.types.prompt import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. The defaults are greedy. Field names and meanings follow the OpenAI and vLLM APIs.

    logprobs: number of alternatives to report per token (0: only the chosen one), None for no log-probabilities.
    seed: makes a sampled request reproducible whatever runs beside it; None draws one.
    thinking_budget: tokens a reasoning model may think before it is made to answer, None for no limit.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    n: int = 1
    thinking_budget: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One generation. ValueError when the images do not have the prompt's layouts."""

    request_id: str  # unique in its engine
    prompt: Prompt
    sampling: SamplingParams  # n is 1 here: n > 1 is n requests
    max_tokens: int  # resolved, at least 1 and within the context
    cache_salt: str = ""  # separates tenants in the caches
    images: tuple[ImagePatches, ...] = ()  # the prompt's, in its order (`Prompt.in_order`)

    def __post_init__(self) -> None:
        self.prompt.check_images(self.images)

    def cache_ids(self) -> tuple[int, ...]:
        """The prompt's token ids, every placeholder replaced by a negative number that holds its image's full digest.

        Two requests share a prefix of cache ids only when they share its text and its images bit for bit; the row
        inside the image is given by the prefix itself.
        """
        ids = list(self.prompt.token_ids)
        for start, stop, image in self.prompt.spans:
            identity = -1 - int.from_bytes(self.images[image].digest, "little")
            ids[start:stop] = [identity] * (stop - start)
        return tuple(ids)


FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logs. top: (token id, log-probability) from likely to unlikely."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of one request, known when it ends: waiting for a slot, encoding its images, prefill, decode."""

    queue: float = 0.0
    encode: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """What one engine step adds to one request.

    finish_reason is None while it runs; on "error", `error` says why; matched_stop: the stop token id that ended it.
    cached_tokens: prompt rows taken from the prefix cache; encoded_images: images whose features were computed.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    matched_stop: int | None = None
    error: Exception | None = None
    cached_tokens: int = 0
    encoded_images: int = 0
    timings: Timings = field(default_factory=Timings)


@dataclass(frozen=True, slots=True)
class Usage:
    """Token accounting of one answer (OpenAI `usage`).

    image_tokens + text_tokens == prompt_tokens; reasoning_tokens: those of the completion that are its thinking, the
    two tags and forced ids among them.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    image_tokens: int
    reasoning_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.reasoning_tokens <= self.completion_tokens:
            raise ValueError(f"{self.reasoning_tokens} reasoning tokens in a completion of {self.completion_tokens}")

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def text_tokens(self) -> int:
        return self.prompt_tokens - self.image_tokens
