"""One answer from its tokens: what counts, what is shown, and what is said of its end."""

from __future__ import annotations

import pytest
from checkpoints import build_tokenizer

from siglane.engine.answers.answer import Answer
from siglane.engine.answers.reasoning import AnswerStream, TextDelta
from siglane.errors import EngineError
from siglane.types import Finished, Prompt, TokenDelta, TokenLogprob

TOKENIZER = build_tokenizer()
A, B, C = (TOKENIZER.convert_tokens_to_ids(letter) for letter in "abc")


def answer(*stop: str) -> Answer:
    return Answer("r", Prompt((1, 2, 3)), AnswerStream(TOKENIZER, stop))


def delta(token_id: int | None = None, finished: Finished | None = None) -> TokenDelta:
    return TokenDelta("r", token_id, None if token_id is None else TokenLogprob(token_id, -1.0), finished)


def test_tokens_become_text_counts_and_an_end() -> None:
    one = answer()
    assert [one.take(delta(A)), one.take(delta(B))] == [TextDelta("a"), TextDelta("b")]
    assert (one.finish_reason, one.usage.completion_tokens, one.usage.cached_tokens) == (None, 2, 0)
    one.take(delta(C, Finished("length", cached_tokens=2)))
    assert (one.text, one.reasoning, one.token_ids, one.finish_reason) == ("abc", "", [A, B, C], "length")
    assert [logprob.token_id for logprob in one.logprobs] == one.token_ids
    assert (one.usage.prompt_tokens, one.usage.completion_tokens, one.usage.cached_tokens) == (3, 3, 2)
    assert (one.matched_stop, one.error) == (None, None)


def test_a_stop_token_counts_and_is_not_shown() -> None:
    one = answer()
    one.take(delta(A))
    assert one.take(delta(B, Finished("stop", matched_stop=B))) == TextDelta()
    assert (one.text, one.token_ids, one.finish_reason, one.matched_stop) == ("a", [A, B], "stop", B)


@pytest.mark.parametrize("end", [Finished("abort"), Finished("length"), Finished("error", error=EngineError("broken"))])
def test_a_stop_string_outlasts_whatever_the_engine_does_next(end: Finished) -> None:
    one = answer("bc")
    said = [one.take(delta(token)) for token in (A, B, C)]
    assert (said, one.matched_stop) == ([TextDelta("a"), TextDelta(), TextDelta()], "bc")
    assert (one.finished, one.finish_reason) == (None, None)  # until it is aborted
    assert one.take(delta(A)) == one.take(delta(B, end)) == TextDelta()
    assert (one.text, one.token_ids, len(one.logprobs)) == ("a", [A, B, C], 3)
    assert (one.finish_reason, one.matched_stop, one.error) == ("stop", "bc", None)


def test_a_stop_string_that_the_last_token_completes() -> None:
    one = answer("b")
    one.take(delta(A))
    one.take(delta(B, Finished("length")))
    assert (one.text, one.finish_reason, one.matched_stop) == ("a", "stop", "b")


def test_an_end_without_a_token_releases_what_was_held_back() -> None:
    one = answer("bc")
    one.take(delta(A))
    one.take(delta(B))
    error = EngineError("broken")
    assert one.take(delta(None, Finished("error", error=error))) == TextDelta("b")
    assert (one.text, one.finish_reason, one.error) == ("ab", "error", error)


def test_no_stop_string_ends_the_first_tokens() -> None:
    """As in vLLM: min_tokens come first, whatever they say."""
    one = Answer("r", Prompt((1, 2, 3)), AnswerStream(TOKENIZER, ("b", "ca"), min_tokens=3))
    said = [one.take(delta(token)).text for token in (A, B, C, A, B)]
    assert (said, one.matched_stop, one.text) == (["a", "b", "c", "a", ""], "b", "abca")
    assert len(one.token_ids) == 5
