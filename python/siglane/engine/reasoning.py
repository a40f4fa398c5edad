"""Token ids to reasoning and text as they come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerFast

from siglane.config.vlm import Thinking
from siglane.engine.detokenize import TextStream
from siglane.engine.thinking import thinking_start
from siglane.families.processor import Processor
from siglane.types import Prompt, SamplingParams


class TextDelta(NamedTuple):
    """New text of an answer, and of the reasoning before it."""

    text: str = ""
    reasoning: str = ""

    @classmethod
    def joined(cls, deltas: Iterable[TextDelta]) -> TextDelta:
        """All of `deltas`, one after the other."""
        texts, reasonings = zip(cls(), *deltas, strict=True)
        return cls("".join(texts), "".join(reasonings))


class AnswerStream:
    """Turns one answer's tokens into its reasoning and its text, the same whether they come together or one by one.

    An answer that begins with `<think>`, or follows a prompt that `opened` it, is reasoning up to the first `</think>`,
    all of it when there is none; what follows, or an answer that begins otherwise, is text. The two tags are in
    neither. White space around both parts is dropped (AIDC-AI/Ovis strips them), so what may be trailing is held back.
    Stop strings end the text; they are not looked for in the reasoning, nor in the first `min_tokens` tokens of both.

    Without `thinking` everything is text, as it stands. reasoning_tokens: tokens of the reasoning and its tags so far.
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
    ) -> None:
        reasons = thinking is not None
        self._tokenizer, self._thinking = tokenizer, thinking
        self._text = TextStream(tokenizer, stop, strip=reasons, skip_special=skip_special)
        self._reasoning = TextStream(tokenizer, strip=reasons, skip_special=skip_special)
        self._part: Literal["unknown", "reasoning", "text"] = "reasoning" if opened else "unknown"
        self.reasoning_tokens = 0
        self._tokens, self._min_tokens = 0, min_tokens

    @classmethod
    def of(cls, prompt: Prompt, sampling: SamplingParams, processor: Processor) -> AnswerStream:
        """The stream of a prompt's answer."""
        thinking, ends = processor.config.thinking, processor.eos_token_ids
        opened = thinking is not None and thinking_start(prompt.token_ids, thinking, ends) == "opened"
        skip = sampling.skip_special_tokens
        return cls(
            processor.tokenizer,
            sampling.stop,
            thinking,
            opened=opened,
            min_tokens=sampling.min_tokens,
            skip_special=not processor.config.special_tokens_are_text if skip is None else skip,
        )

    @property
    def stopped(self) -> str | None:
        """The stop string that was met; nothing follows it."""
        return self._text.stopped

    def push(self, token_ids: Sequence[int], finished: bool = False) -> TextDelta:
        """Adds tokens, returns what is new; `finished` releases what is held back."""
        deltas = [self._take(token_id) for token_id in token_ids]
        if finished:
            deltas.append(TextDelta(self._text.push((), finished=True), self._reasoning.push((), finished=True)))
        return TextDelta.joined(deltas)

    def _take(self, token_id: int) -> TextDelta:
        thinking = self._thinking
        self._tokens += 1
        if thinking is None:
            return TextDelta(self._text_of(token_id))
        if self._part == "unknown":
            if token_id == thinking.start:
                self._part = "reasoning"
            elif not self._is_space(token_id):
                self._part = "text"
        tag = token_id in (thinking.start, thinking.end)
        if self._part != "reasoning":
            return TextDelta("" if tag else self._text_of(token_id))
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
