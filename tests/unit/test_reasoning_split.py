"""Reasoning and answer are told apart the same way however the tokens come, and neither shows a tag or loose space."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
from checkpoints import build_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from siglane.config.vlm import Thinking
from siglane.engine.answers.reasoning import AnswerStream, TextDelta

TAGS = ("<think>", "</think>")
LETTERS = ("a", "b", "€", " ", "\n", "\n\n", "\t", "<|im_end|>")


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Qwen3's way: the tags are added tokens and not special, so a plain decode shows them."""
    found = build_tokenizer(())
    found.add_tokens([AddedToken(text, special=False, normalized=False) for text in TAGS])
    return found


def ids_of(text: str) -> list[int]:
    ids: list[int] = tokenizer()(text, add_special_tokens=False).input_ids
    return ids


def thinking() -> Thinking:
    (start,), (end,) = map(ids_of, TAGS)
    return Thinking(start, end, (end,))


def text_of(ids: Sequence[int]) -> str:
    shown = [one for one in ids if one not in (thinking().start, thinking().end)]
    text = tokenizer().decode(shown, skip_special_tokens=True)
    assert isinstance(text, str)
    return text.strip()


def split(ids: Sequence[int], opened: bool) -> tuple[str, str, int]:
    """Text, reasoning and its tokens, from the whole answer."""
    start, end, begin = thinking().start, thinking().end, 0
    if not opened:
        while begin < len(ids) and not tokenizer().decode([ids[begin]], skip_special_tokens=True).strip():
            begin += 1
        if begin == len(ids) or ids[begin] != start:
            return text_of(ids), "", 0
    rest = ids[begin:]
    stop = rest.index(end) + 1 if end in rest else len(rest)
    return text_of(rest[stop:]), text_of(rest[:stop]), stop


def cut(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """Character by character: ends as soon as the text ends with a stop string; the longest if several do."""
    for length in range(len(text) + 1):
        ending = [one for one in stop if text[:length].endswith(one)]
        if ending:
            longest = max(ending, key=len)
            return text[: length - len(longest)].rstrip(), longest
    return text, None


def said(
    ids: Sequence[int], sizes: Sequence[int], opened: bool = False, stop: Sequence[str] = ()
) -> tuple[list[TextDelta], AnswerStream]:
    """The pieces that come when `ids` are pushed in groups of `sizes`, over and over."""
    stream = AnswerStream(tokenizer(), stop, thinking(), opened=opened)
    pieces, start, number = [], 0, 0
    while start < len(ids):
        size = sizes[number % len(sizes)]
        pieces.append(stream.push(ids[start : start + size]))
        start, number = start + size, number + 1
    return [*pieces, stream.push([], finished=True)], stream


def both(pieces: Sequence[TextDelta]) -> tuple[str, str]:
    """Text and reasoning."""
    whole = TextDelta.joined(pieces)
    return whole.text, whole.reasoning


WORDS = st.lists(st.sampled_from((*LETTERS, *TAGS)), max_size=14)
# answers as models give them are rare among random ones
BEGINNINGS = st.sampled_from(["", "<think>", "\n<think>\n"])
ANSWERS = st.tuples(BEGINNINGS, WORDS).map(
    lambda found: [one for word in (found[0], *found[1]) for one in ids_of(word)]
)
SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(ANSWERS, SIZES, st.booleans())
@settings(deadline=None, max_examples=150)
def test_any_grouping_gives_the_split_of_the_whole(ids: list[int], sizes: list[int], opened: bool) -> None:
    expected = split(ids, opened)
    for groups in (sizes, [len(ids) or 1]):
        pieces, stream = said(ids, groups, opened)
        assert (*both(pieces), stream.reasoning_tokens) == expected
        assert not any(tag in text for text in both(pieces) for tag in TAGS)


@given(ANSWERS, SIZES, st.booleans())
@settings(deadline=None)
def test_what_was_said_is_never_taken_back_and_no_text_comes_before_its_reasoning_ends(
    ids: list[int], sizes: list[int], opened: bool
) -> None:
    pieces, _ = said(ids, [1], opened)
    begun = False
    for piece in pieces:
        assert not (begun and piece.reasoning)
        begun = begun or bool(piece.text)
    whole = both(pieces)
    for text in whole:
        assert text == text.strip()


STOPS = st.lists(
    st.sampled_from(["a", "ab", "\n", "\n\n", "b\n", " a", "€", "\na"]), min_size=1, max_size=2, unique=True
)


@given(ANSWERS, SIZES, st.booleans(), STOPS)
@settings(deadline=None, max_examples=150)
def test_stop_strings_cut_the_stripped_answer_and_not_the_reasoning(
    ids: list[int], sizes: list[int], opened: bool, stop: list[str]
) -> None:
    text, reasoning, thought = split(ids, opened)
    # a stop string may be trailing space, which only the stop strings' reference has to know about
    tags, part = {thinking().start, thinking().end}, list(ids)
    if thought:
        part = part[part.index(thinking().end) + 1 :] if thinking().end in part else []
    raw = tokenizer().decode([one for one in part if one not in tags], skip_special_tokens=True)
    expected, matched = cut(raw.lstrip(), stop)
    pieces, stream = said(ids, sizes, opened, stop)
    whole = both(pieces)
    assert (whole[0], stream.stopped) == (expected.rstrip(), matched)
    if matched is None:
        assert whole == (text, reasoning)


@pytest.mark.parametrize(
    ("answer", "text", "reasoning"),
    [
        ("<think>\nab\n</think>\n\nba", "ba", "ab"),
        ("\n<think>ab</think>ba", "ba", "ab"),
        ("<think>\n\n</think>\n\nba\n", "ba", ""),
        ("<think>\nab", "", "ab"),
        ("<think>", "", ""),
        ("ab <think>ba</think> a", "ab ba a", ""),
        ("ab</think>ba", "abba", ""),
        ("<think>a<think>b</think>a</think>b", "ab", "ab"),
        ("  ab \n b \n", "ab \n b", ""),
        ("<think>a\n\n\nb  </think>\n\na\n\n\nb  ", "a\n\n\nb", "a\n\n\nb"),
        ("", "", ""),
    ],
)
def test_answers_by_example(answer: str, text: str, reasoning: str) -> None:
    assert both(said(ids_of(answer), [1])[0]) == (text, reasoning)


def test_after_a_prompt_that_opened_it_an_answer_begins_with_reasoning() -> None:
    pieces, stream = said(ids_of("\nab\n</think>\n\nba"), [1], opened=True)
    assert both(pieces) == ("ba", "ab")
    assert stream.reasoning_tokens == len(ids_of("\nab\n</think>"))


def test_space_is_held_until_something_follows() -> None:
    stream = AnswerStream(tokenizer(), (), thinking())
    tokens = ("<think>", "\n", "a", "\n", "b", "\n", "</think>", "\n\n", "a", " ", "b", "\n")
    steps = [stream.push(ids_of(token)) for token in tokens]
    assert [step.reasoning for step in steps] == ["", "", "a", "", "\nb", "", "", "", "", "", "", ""]
    assert [step.text for step in steps] == ["", "", "", "", "", "", "", "", "a", "", " b", ""]
    assert stream.push([], finished=True) == TextDelta()


def test_a_stop_string_of_space_does_not_end_an_answer_before_it_began() -> None:
    pieces, stream = said(ids_of("<think>a\n\nb</think>\n\nab\n\nb"), [1], stop=("\n\n",))
    assert (both(pieces), stream.stopped) == (("ab", "a\n\nb"), "\n\n")


@given(ANSWERS)
@settings(deadline=None)
def test_a_model_that_does_not_reason_has_its_text_as_it_stands(ids: list[int]) -> None:
    stream = AnswerStream(tokenizer())
    pieces = [stream.push(ids), stream.push([], finished=True)]
    whole = tokenizer().decode(ids, skip_special_tokens=True)
    assert (both(pieces), stream.reasoning_tokens) == ((whole, ""), 0)
