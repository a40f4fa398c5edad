"""What a prompt's answer is, and a prompt on its way to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from siglane.engine.answers.answer import Answer
from siglane.errors import EngineError, UserError
from siglane.families.report import ImageReport
from siglane.types import FinishReason, SamplingParams, Timings, TokenDelta, TokenLogprob, ToolCall, Usage

OnText = Callable[[int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The answer to one prompt, or why there is none.

    text: the answer; reasoning: what a reasoning model thought before it, "" when it did not; tool_calls: what it
    calls, finish_reason is "tool_calls" then;
    images: what the model saw of each image and video, and the budget that was applied; logprobs: one per output token
    when asked for; outputs: all n answers in order, each with its own usage, of which this one is the first; () in
    those themselves and where there is an error before any answer; error: set exactly when finish_reason is "error",
    and the text is then what came before it.
    """

    text: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    images: tuple[ImageReport, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    timings: Timings = field(default_factory=Timings)
    outputs: tuple[Generation, ...] = ()
    error: UserError | EngineError | None = None


@dataclass(slots=True, eq=False)
class Row:
    """One prompt on its way: first nothing is known, then its tokens, then its answers or an error.

    It holds none of the caller's images: rows behind a slow one may wait here for long.
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
        return len(self.answers) == self.params.n and all(answer.finished for answer in self.answers)

    def take(self, answer: Answer, delta: TokenDelta) -> None:
        told = answer.take(delta)
        if told.text and self.on_text is not None and answer is self.answers[0]:
            self.on_text(self.number, told.text)

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
        outputs = tuple(map(self._output, self.answers))
        return replace(outputs[0], outputs=outputs)

    def _output(self, answer: Answer) -> Generation:
        assert answer.finished is not None
        assert answer.finish_reason is not None
        return Generation(
            text=answer.text,
            reasoning=answer.reasoning,
            tool_calls=answer.calls,
            prompt_token_ids=self.prompt_token_ids,
            output_token_ids=tuple(answer.token_ids),
            finish_reason=answer.finish_reason,
            usage=answer.usage,
            images=self.images,
            logprobs=tuple(answer.logprobs),
            timings=answer.finished.timings,
            error=None if answer.error is None else blamed(answer.error),
        )


def blamed(error: Exception) -> UserError | EngineError:
    """`error` as a row can carry it; what was not raised on purpose keeps its traceback as the cause."""
    if isinstance(error, UserError | EngineError):
        return error
    unexpected = EngineError(f"{type(error).__name__}: {error}", code="internal_error")
    unexpected.__cause__ = error
    return unexpected
