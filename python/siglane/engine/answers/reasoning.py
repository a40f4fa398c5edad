"""Token ids to reasoning, text and calls of tools as they come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerFast

from siglane.config.vlm import Thinking
from siglane.engine.answers.detokenize import TextStream
from siglane.engine.answers.thinking import thinking_start
from siglane.engine.answers.tool_calls import CallDelta, CallStream
from siglane.families.processor import Processor
from siglane.types import Prompt, SamplingParams, ToolUse


class TextDelta(NamedTuple):
    """New text of an answer, of the reasoning before it, and of the calls in it."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()

    @classmethod
    def joined(cls, deltas: Iterable[TextDelta]) -> TextDelta:
        """All of `deltas`, one after the other."""
        texts, reasonings, calls = zip(cls(), *deltas, strict=True)
        return cls("".join(texts), "".join(reasonings), tuple(chain.from_iterable(calls)))


class AnswerStream:
    """Turns one answer's tokens into its reasoning and its text, the same whether they come together or one by one.

    An answer that begins with `<think>`, or follows a prompt that `opened` it, is reasoning up to the first `</think>`,
    all of it when there is none; what follows, or an answer that begins otherwise, is text. The two tags are in
    neither. White space around both parts is dropped (AIDC-AI/Ovis strips them), so what may be trailing is held back.
    Stop strings end the text; they are not looked for in the reasoning, nor in the first `min_tokens` tokens of both.

    Without `thinking` everything is text, as it stands. calls: takes the calls of tools out of the text, None where
    there are none to call. reasoning_tokens: tokens of the reasoning and its tags so far.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        stop: Sequence[str] = (),
        thinking: Thinking | None = None,
        *,
        opened: bool = False,
        min_tokens: int = 0,
        skip_special: bool = True,
        calls: CallStream | None = None,
    ) -> None:
        reasons, shown = thinking is not None, () if calls is None else calls.tags
        self._tokenizer, self._thinking = tokenizer, thinking
        self._text = TextStream(tokenizer, stop, strip=reasons, skip_special=skip_special, shown=shown)
        self._reasoning = TextStream(tokenizer, strip=reasons, skip_special=skip_special)
        self._part: Literal["unknown", "reasoning", "text"] = "reasoning" if opened else "unknown"
        self.reasoning_tokens = 0
        self._tokens, self._min_tokens = 0, min_tokens
        self.calls = calls

    @classmethod
    def of(
        cls, prompt: Prompt, sampling: SamplingParams, processor: Processor, use: ToolUse | None = None
    ) -> AnswerStream:
        """The stream of a prompt's answer. use: of the tools that the prompt tells of."""
        thinking, ends = processor.config.thinking, processor.eos_token_ids
        opened = thinking is not None and thinking_start(prompt.token_ids, thinking, ends) == "opened"
        skip, form = sampling.skip_special_tokens, None if use is None else processor.call_format
        return cls(
            processor.tokenizer,
            sampling.stop,
            thinking,
            opened=opened,
            min_tokens=sampling.min_tokens,
            skip_special=not processor.config.special_tokens_are_text if skip is None else skip,
            calls=None if use is None or form is None else CallStream.of(use, form, sampling.constraint),
        )

    @property
    def stopped(self) -> str | None:
        """The stop string that was met; nothing follows it."""
        return self._text.stopped

    @property
    def ended(self) -> bool:
        """Whether nothing follows: a stop string was met, or the only call is whole."""
        return self.stopped is not None or (self.calls is not None and self.calls.complete)

    def push(self, token_ids: Sequence[int], finished: bool = False) -> TextDelta:
        """Adds tokens, returns what is new; `finished` releases what is held back."""
        deltas = [self._take(token_id) for token_id in token_ids]
        if finished:
            text, reasoning = self._text.push((), finished=True), self._reasoning.push((), finished=True)
            deltas.append(self._told(text, finished=True)._replace(reasoning=reasoning))
        return TextDelta.joined(deltas)

    def _told(self, text: str, *, finished: bool = False) -> TextDelta:
        """The text, and the calls in it."""
        if self.calls is None:
            return TextDelta(text)
        text, calls = self.calls.push(text, finished or self.stopped is not None)
        return TextDelta(text, "", calls)

    def _take(self, token_id: int) -> TextDelta:
        thinking = self._thinking
        self._tokens += 1
        if thinking is None:
            return self._told(self._text_of(token_id))
        if self._part == "unknown":
            if token_id == thinking.start:
                self._part = "reasoning"
            elif not self._is_space(token_id):
                self._part = "text"
        tag = token_id in (thinking.start, thinking.end)
        if self._part != "reasoning":
            return self._told("" if tag else self._text_of(token_id))
        self.reasoning_tokens += 1
        if token_id == thinking.end:
            self._part = "text"
        return TextDelta("", self._reasoning.push([] if tag else [token_id], finished=token_id == thinking.end))

    def _text_of(self, token_id: int) -> str:
        return self._text.push([token_id], search=self._tokens > self._min_tokens)

    def _is_space(self, token_id: int) -> bool:
        text = self._tokenizer.decode([token_id], skip_special_tokens=True)
        assert isinstance(text, str)  # a list only for a list of lists
        return not text.strip()
