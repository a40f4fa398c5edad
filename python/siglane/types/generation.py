"""One generation: how tokens are chosen, what is asked of the engine and what it answers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from types import MappingProxyType
from typing import Literal

from siglane.types.constraint import Constraint
from siglane.types.image import ImagePatches
from siglane.types.prompt import Prompt
from siglane.types.reading import Read, Readout

# the least and the greatest value of every number in SamplingParams; they keep float32 logits finite
SAMPLING_BOUNDS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "max_tokens": (1, math.inf),
        "min_tokens": (0, math.inf),
        "temperature": (0, 2),
        "top_k": (-1, math.inf),
        "top_p": (0, 1),
        "min_p": (0, 1),
        "repetition_penalty": (0.01, 100),
        "frequency_penalty": (-2, 2),
        "presence_penalty": (-2, 2),
        "logprobs": (0, math.inf),
        "n": (1, math.inf),
        "thinking_budget": (1, math.inf),
        "num_speculative_tokens": (0, 32),
    }
)


INTEGERS = {"max_tokens", "min_tokens", "top_k", "logprobs", "n", "thinking_budget", "num_speculative_tokens"}


def _is_id(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_bias(pair: object) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and _is_id(pair[0]) and isinstance(pair[1], Real)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. The defaults are greedy. Field names and meanings follow the OpenAI and vLLM APIs.

    top_k: 0 and -1 mean no limit.
    logprobs: number of alternatives to report per token (0: only the chosen one), None for no log-probabilities.
    seed: makes a sampled request reproducible whatever runs beside it; None draws one.
    thinking_budget: tokens a reasoning model may think before it is made to answer, None for no limit.
    num_speculative_tokens: tokens that one step may guess from what was said before; guesses are checked and change no
        answer. None: as the engine is set.
    skip_special_tokens: whether special tokens of an answer have no text, as ever the one that ends it; None: as the
        model is used, whose tags of a document may be special tokens.
    constraint: what the answer has to match, which ends where that does, whatever ignore_eos and min_tokens say; None
        for nothing.
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
    num_speculative_tokens: int | None = None
    skip_special_tokens: bool | None = None
    constraint: Constraint | None = None

    def complaint(self) -> tuple[str, str] | None:
        """The first field whose value no sampler can honour, and what is wrong with it; None when all can be."""
        for name, (low, high) in SAMPLING_BOUNDS.items():
            value = getattr(self, name)
            kind = Integral if name in INTEGERS else Real
            if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
                return name, f"{name} must be {'a whole number' if kind is Integral else 'a number'}, got {value!r}"
            if value is not None and not low <= float(value) <= high:
                limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
                hint = "; enable_thinking=false turns thinking off" if name == "thinking_budget" else ""
                return name, f"{name} must be {limits}, got {value}{hint}"
        return self._complaint_of_lists()

    def _complaint_of_lists(self) -> tuple[str, str] | None:
        skip: object = self.skip_special_tokens
        if not isinstance(skip, bool | None):
            return "skip_special_tokens", f"skip_special_tokens must be true or false, got {skip!r}"
        if not isinstance(self.stop, tuple) or not all(isinstance(one, str) for one in self.stop):
            return "stop", f"stop must be a text or a list of texts, got {self.stop!r}"
        if not all(self.stop):
            return "stop", "a stop string must not be empty"
        if not isinstance(self.stop_token_ids, tuple) or not all(map(_is_id, self.stop_token_ids)):
            return "stop_token_ids", f"stop_token_ids must be a list of token ids, got {self.stop_token_ids!r}"
        pairs = self.logit_bias if isinstance(self.logit_bias, tuple) else (None,)
        if not all(map(_is_bias, pairs)):
            return "logit_bias", f"logit_bias must give biases by token id, got {self.logit_bias!r}"
        return None

    def choice(self, index: int) -> SamplingParams:
        """The parameters of answer number `index` of the n: where there is a seed, each has its own."""
        return replace(self, n=1, seed=None if self.seed is None else self.seed + index)


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One generation, or reads of a prompt alone. ValueError when the images do not have the prompt's layouts, or the
    reads are not at ascending places of it."""

    request_id: str  # unique in its engine
    prompt: Prompt
    sampling: SamplingParams  # n is 1 here: n > 1 is n requests
    max_tokens: int  # resolved, within the context; 0: the prompt is read and nothing answered
    cache_salt: str = ""  # separates tenants in the caches
    images: tuple[ImagePatches, ...] = ()  # the prompt's, in its order (`Prompt.in_order`)
    trace_id: str = ""  # what logs call it where that is not its request_id: several may be one client's
    batch: bool = False  # it yields to requests that somebody waits for
    reads: tuple[Read, ...] = ()  # told as the prompt is computed
    raw: bool = False  # continues a text: no part of it is thinking

    def __post_init__(self) -> None:
        self.prompt.check_images(self.images)
        places = [-1, *(read.position for read in self.reads), len(self.prompt.token_ids)]
        if any(place >= following for place, following in itertools.pairwise(places)):
            raise ValueError(f"reads at {places[1:-1]} do not ascend within a prompt of {places[-1]} tokens")

    @property
    def log_fields(self) -> dict[str, str]:
        """`extra` of a log record about it."""
        return {"request_id": self.trace_id or self.request_id}

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


FinishReason = Literal["stop", "length", "abort", "error", "tool_calls"]  # the last one is an answer's, no engine's


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
class Finished:
    """How a request ended, known once.

    matched_stop: the stop token that ended it; error: why, exactly when reason is "error"; cached_tokens: prompt rows
    taken from the prefix cache; encoded_images: images whose features were computed for it;
    accepted_prediction_tokens, rejected_prediction_tokens: guessed tokens that were right, and those that were not.
    """

    reason: FinishReason
    matched_stop: int | None = None
    error: Exception | None = None
    cached_tokens: int = 0
    encoded_images: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0
    timings: Timings = field(default_factory=Timings)


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """What one engine step adds to one request: a token, its end, or both.

    token_id: None when nothing is chosen: an error, an abort, a prompt that is read; logprob: where it was asked for;
    readouts: of the request's `reads`, in their order.
    """

    request_id: str
    token_id: int | None = None
    logprob: TokenLogprob | None = None
    finished: Finished | None = None
    readouts: tuple[Readout, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token accounting of one answer (OpenAI `usage`).

    image_tokens + text_tokens == prompt_tokens; reasoning_tokens: those of the completion that are its thinking, the
    two tags and forced ids among them; accepted_prediction_tokens: those that were guessed right,
    rejected_prediction_tokens: wrong guesses, which are not in the completion.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    image_tokens: int
    reasoning_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.reasoning_tokens <= self.completion_tokens:
            raise ValueError(f"{self.reasoning_tokens} reasoning tokens in a completion of {self.completion_tokens}")

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def text_tokens(self) -> int:
        return self.prompt_tokens - self.image_tokens
