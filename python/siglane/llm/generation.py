"""What a prompt's answer is, and a prompt on its way to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from siglane.engine.reasoning import AnswerStream, Said
from siglane.errors import EngineError, UserError
from siglane.families.report import ImageReport
from siglane.types import FinishReason, SamplingParams, Timings, TokenDelta, TokenLogprob, Usage

OnText = Callable[[int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The answer to one prompt, or why there is none.

    text: the answer; reasoning: what a reasoning model thought before it, "" when it did not;
    images: what the model saw of each image and video, and the budget that was applied; logprobs: one per output token
    when asked for; alternatives: the further answers of a request with n > 1, each
    with its own usage; error: set exactly when finish_reason is "error", and the text is then what came before it.
    """

    text: str
    reasoning: str = ""
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    images: tuple[ImageReport, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    timings: Timings = field(default_factory=Timings)
    alternatives: tuple[Generation, ...] = ()
    error: UserError | EngineError | None = None


@dataclass(slots=True, eq=False)
class Row:
    """One prompt on its way: first nothing is known, then its tokens, then its answers or an error.

    It holds none of the caller's pictures: rows behind a slow one may wait here for long.
    """

    number: int
    params: SamplingParams
    on_text: OnText | None
    prompt_token_ids: tuple[int, ...] = ()
    image_tokens: int = 0
    images: tuple[ImageReport, ...] = ()
    answers: list[Answer] = field(default_factory=list)
    error: UserError | EngineError | None = None

    @property
    def done(self) -> bool:
        if self.error is not None:
            return True
        return len(self.answers) == self.params.n and all(answer.finish_reason for answer in self.answers)

    def generation(self) -> Generation:
        if self.error is not None:
            usage = Usage(len(self.prompt_token_ids), 0, 0, self.image_tokens)
            return Generation(
                text="",
                prompt_token_ids=self.prompt_token_ids,
                output_token_ids=(),
                finish_reason="error",
                usage=usage,
                images=self.images,
                error=self.error,
            )
        first, *others = (answer.generation() for answer in self.answers)
        return dataclasses.replace(first, alternatives=tuple(others))


@dataclass(slots=True, eq=False)
class Answer:
    """One request in the engine and what it has said so far."""

    row: Row
    stream: AnswerStream
    pieces: list[Said] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    last: TokenDelta | None = None
    finish_reason: FinishReason | None = None

    def take(self, delta: TokenDelta) -> None:
        self.last, self.finish_reason = delta, delta.finish_reason
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        shown = delta.token_ids if delta.matched_stop is None else delta.token_ids[:-1]
        said = self.stream.push(shown, finished=delta.finish_reason is not None)
        self.pieces.append(said)
        if said.text and self.row.on_text is not None and self is self.row.answers[0]:
            self.row.on_text(self.row.number, said.text)

    def generation(self) -> Generation:
        assert self.last is not None
        assert self.finish_reason is not None
        row = self.row
        text, reasoning = Said.joined(self.pieces)
        return Generation(
            text=text,
            reasoning=reasoning,
            prompt_token_ids=row.prompt_token_ids,
            output_token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            usage=Usage(
                prompt_tokens=len(row.prompt_token_ids),
                completion_tokens=len(self.token_ids),
                cached_tokens=self.last.cached_tokens,
                image_tokens=row.image_tokens,
                reasoning_tokens=self.stream.reasoning_tokens,
            ),
            images=row.images,
            logprobs=tuple(self.logprobs),
            timings=self.last.timings,
            error=None if self.last.error is None else blamed(self.last.error),
        )


def blamed(error: Exception) -> UserError | EngineError:
    """`error` as a row can carry it; what was not raised on purpose keeps its traceback as the cause."""
    if isinstance(error, UserError | EngineError):
        return error
    unexpected = EngineError(f"{type(error).__name__}: {error}", code="internal_error")
    unexpected.__cause__ = error
    return unexpected
