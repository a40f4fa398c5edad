"""One request's answer, from its tokens to text, counts and an ending; over HTTP and offline alike."""

from __future__ import annotations

from siglane.engine.answers.reasoning import AnswerStream, TextDelta
from siglane.engine.answers.tool_calls import joined_calls
from siglane.families.processor import Processor
from siglane.types import (
    Finished,
    FinishReason,
    Prompt,
    Readout,
    SamplingParams,
    TokenDelta,
    TokenLogprob,
    ToolCall,
    ToolUse,
    Usage,
)


class Answer:
    """What one request has been answered so far. It sees none of the request's images: answers may wait for long.

    token_ids, logprobs: of every token up to the one that completed a stop string; readouts: of the prompt's places
    that were asked for; finished: how the engine ended it.
    """

    def __init__(self, request_id: str, prompt: Prompt, stream: AnswerStream) -> None:
        self.request_id = request_id
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.readouts: list[Readout] = []
        self.finished: Finished | None = None
        self._prompt_tokens, self._image_tokens = len(prompt.token_ids), prompt.image_tokens
        self._stream = stream
        self._deltas: list[TextDelta] = []

    @classmethod
    def of(
        cls, request_id: str, prompt: Prompt, sampling: SamplingParams, processor: Processor, use: ToolUse | None = None
    ) -> Answer:
        """use: of the tools that the prompt tells of."""
        return cls(request_id, prompt, AnswerStream.of(prompt, sampling, processor, use))

    @classmethod
    def raw(cls, request_id: str, prompt: Prompt, sampling: SamplingParams, processor: Processor) -> Answer:
        """Of a text that is continued: no part of it is told apart."""
        return cls(request_id, prompt, AnswerStream(processor.tokenizer, sampling.stop, min_tokens=sampling.min_tokens))

    def take(self, delta: TokenDelta) -> TextDelta:
        """What `delta` adds to the text: nothing once the answer has ended in a way that the engine does not know."""
        self.finished = delta.finished
        self.readouts += delta.readouts
        if self.ended:
            return TextDelta()
        shown: tuple[int, ...] = ()
        if delta.token_id is not None:
            self.token_ids.append(delta.token_id)
            if self._matched_token is None:  # a token that ends the answer counts, but is no text
                shown = (delta.token_id,)
        if delta.logprob is not None:
            self.logprobs.append(delta.logprob)
        self._deltas.append(self._stream.push(shown, finished=self.finished is not None))
        return self._deltas[-1]

    @property
    def text(self) -> str:
        return TextDelta.joined(self._deltas).text

    @property
    def reasoning(self) -> str:
        return TextDelta.joined(self._deltas).reasoning

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        return joined_calls(TextDelta.joined(self._deltas).calls)

    @property
    def ended(self) -> bool:
        """Whether a stop string, or the only call that is allowed, ended it. The engine goes on until the request is
        aborted."""
        return self._stream.ended

    @property
    def matched_stop(self) -> str | int | None:
        """The stop string or the id of the stop token that ended it."""
        return self._matched_token if self._stream.stopped is None else self._stream.stopped

    @property
    def finish_reason(self) -> FinishReason | None:
        """None while the engine works on it; what ended it before outlasts what happens after it."""
        if self.finished is None:
            return None
        reason, calls = "stop" if self.ended else self.finished.reason, self._stream.calls
        called = calls is not None and calls.count > 0 and not calls.unfinished
        return "tool_calls" if reason == "stop" and called else reason

    @property
    def error(self) -> Exception | None:
        return self.finished.error if self.finished is not None and self.finish_reason == "error" else None

    @property
    def usage(self) -> Usage:
        """Of the tokens so far; what was cached and guessed is known at the end."""
        finished = self.finished
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=len(self.token_ids),
            cached_tokens=0 if finished is None else finished.cached_tokens,
            image_tokens=self._image_tokens,
            reasoning_tokens=self._stream.reasoning_tokens,
            accepted_prediction_tokens=0 if finished is None else finished.accepted_prediction_tokens,
            rejected_prediction_tokens=0 if finished is None else finished.rejected_prediction_tokens,
        )

    @property
    def _matched_token(self) -> int | None:
        return None if self.finished is None else self.finished.matched_stop
