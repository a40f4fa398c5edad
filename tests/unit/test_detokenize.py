"""Streamed text is the whole text, and a stop string cuts it at the same character however tokens fall."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from siglane.engine.answers.detokenize import TextStream

CORPUS = ("the cat and the dog see the red square", "größer, naïve, 東京 €20 👍🏽 👨‍👩‍👧", "\n\n  \tdone. STOP")
# every length in UTF-8, joiners, and the replacement character itself
ALPHABET = "ab c\n\u00e9\u4eac\u20ac\U0001f44d\U0001f3fd\u200d\u0301\ufffd"
TEXTS = st.text(st.sampled_from(ALPHABET) | st.characters(exclude_categories=["Cs"]), max_size=12)
SPECIAL = "<|im_end|>"


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few merges, so that most characters beyond ASCII are split over tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, special_tokens=[SPECIAL], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def ids_of(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False)


def bytes_of(text: str) -> list[int]:
    """The text as one token per byte: the finest way to split it."""
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [tokenizer().convert_tokens_to_ids(letter) for word, _ in alphabet for letter in word]


def stream(ids: list[int], stop: tuple[str, ...] = (), sizes: tuple[int, ...] = (1,)) -> tuple[list[str], TextStream]:
    """The pieces that come when `ids` are pushed in groups of `sizes`, over and over."""
    texts = TextStream(tokenizer(), stop)
    pieces, start, number = [], 0, 0
    while start < len(ids):
        pieces.append(texts.push(ids[start : start + sizes[number % len(sizes)]]))
        start, number = start + sizes[number % len(sizes)], number + 1
    pieces.append(texts.push([], finished=True))
    return pieces, texts


def cut(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """Character by character: ends as soon as the text ends with a stop string; the longest if several do."""
    for length in range(len(text) + 1):
        ending = [one for one in stop if text[:length].endswith(one)]
        if ending:
            longest = max(ending, key=len)
            return text[: length - len(longest)], longest
    return text, None


class TestStreaming:
    @given(TEXTS)
    @settings(deadline=None)
    def test_token_by_token_gives_the_whole_text(self, text: str) -> None:
        for ids in (ids_of(text), bytes_of(text)):
            assert tokenizer().decode(ids) == text
            assert "".join(stream(ids)[0]) == text

    @given(st.lists(st.integers(0, 289), max_size=12), st.lists(st.integers(1, 4), min_size=1, max_size=3))
    @settings(deadline=None)
    def test_any_tokens_in_any_groups_give_the_whole_decode(self, ids: list[int], sizes: list[int]) -> None:
        """Broken UTF-8 and special tokens too."""
        pieces, _ = stream(ids, sizes=tuple(sizes))
        assert "".join(pieces) == tokenizer().decode(ids, skip_special_tokens=True)

    @pytest.mark.parametrize("character", ["é", "€", "京", "👍"])
    def test_a_character_comes_with_its_last_byte_and_not_before(self, character: str) -> None:
        ids = bytes_of(character)
        assert len(ids) == len(character.encode()) > 1
        assert stream(ids)[0] == [""] * (len(ids) - 1) + [character, ""]

    def test_text_comes_with_its_token(self) -> None:
        ids = ids_of("the cat and the dog")
        assert stream(ids)[0][:-1] == [tokenizer().decode([one]) for one in ids]

    def test_what_ends_inside_a_character_is_shown_as_broken_at_the_end(self) -> None:
        assert "".join(stream(bytes_of("ab€")[:-1])[0]) == "ab\ufffd"

    def test_the_space_before_a_word_survives_where_a_lone_word_loses_it(self) -> None:
        """SentencePiece's way: a token's text depends on whether something stands before it."""
        backend = Tokenizer(models.WordLevel({"▁the": 0, "▁cat": 1, "s": 2}, unk_token="s"))
        backend.decoder = decoders.Metaspace()
        words = PreTrainedTokenizerFast(tokenizer_object=backend)
        assert words.decode([1]) == "cat"
        texts = TextStream(words)
        assert [texts.push([one]) for one in (0, 1, 2, 0, 1)] == ["the", " cat", "s", " the", " cat"]

    def test_special_tokens_have_no_text(self) -> None:
        end = tokenizer().convert_tokens_to_ids(SPECIAL)
        split = bytes_of("€")
        assert "".join(stream([*ids_of("a"), end, split[0], end, *split[1:], end])[0]) == "a€"


STOPS = st.lists(st.text(st.sampled_from("ab€"), min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)
STOPPABLE = st.text(st.sampled_from("abc€ "), max_size=14)
SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


class TestStopStrings:
    @given(STOPPABLE, STOPS, SIZES)
    @settings(deadline=None, max_examples=150)
    def test_the_text_ends_exactly_before_the_first_stop_however_tokens_fall(
        self, text: str, stop: tuple[str, ...], sizes: tuple[int, ...]
    ) -> None:
        expected, matched = cut(text, stop)
        for ids in (ids_of(text), bytes_of(text)):
            pieces, texts = stream(ids, stop, sizes)
            assert ("".join(pieces), texts.stopped) == (expected, matched)

    @given(STOPPABLE, STOPS, SIZES)
    @settings(deadline=None)
    def test_nothing_is_shown_that_a_stop_takes_back_and_nothing_else_is_held(
        self, text: str, stop: tuple[str, ...], sizes: tuple[int, ...]
    ) -> None:
        """What is held back at any moment is the longest end of the text that may still become a stop string."""
        ids = bytes_of(text)
        texts = TextStream(tokenizer(), stop)
        shown = ""
        for position, one in enumerate(ids):
            shown += texts.push([one])
            if texts.stopped is not None:
                break
            known = tokenizer().decode(ids[: position + 1]).rstrip("\ufffd")
            endings = [known[start:] for start in range(len(known))]  # the longest comes first
            held = next((ending for ending in endings if any(one.startswith(ending) for one in stop)), "")
            assert shown == known.removesuffix(held)
        assert cut(text, stop)[0].startswith(shown)

    @pytest.mark.parametrize(
        ("stop", "text", "expected"),
        [
            (("STOP",), "go STOP on", "go "),
            (("STOP",), "STOP", ""),
            (("STOP",), "STO", "STO"),
            (("aab",), "aaab", "a"),
            (("ab", "b"), "aab", "a"),
            (("abcd", "bc"), "abcd", "a"),
            (("cd", "abc"), "abcd", ""),
            (("\n\n",), "done.\n\nmore", "done."),
            (("€2",), "for €20", "for "),
        ],
    )
    def test_the_first_to_be_complete_wins(self, stop: tuple[str, ...], text: str, expected: str) -> None:
        for ids in (ids_of(text), bytes_of(text)):
            for sizes in ((1,), (2,), (len(ids),)):
                assert "".join(stream(ids, stop, sizes)[0]) == expected

    def test_nothing_follows_a_stop(self) -> None:
        texts = TextStream(tokenizer(), ("b",))
        assert texts.push(ids_of("ab")) == "a"
        assert texts.push(ids_of("c")) == ""
        assert texts.push([], finished=True) == ""
        assert texts.stopped == "b"

    def test_a_stop_that_the_end_completes_is_cut_too(self) -> None:
        texts = TextStream(tokenizer(), ("b",))
        assert texts.push(ids_of("ab"), finished=True) == "a"
        assert texts.stopped == "b"


def test_an_answer_of_broken_bytes_is_not_decoded_from_its_start_every_time() -> None:
    broken = tokenizer().convert_tokens_to_ids("ä")  # the letter that stands for the lone byte 0xE4
    decoded = 0

    class Counting:
        def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str | list[str]:
            nonlocal decoded
            decoded += len(ids)
            return tokenizer().decode(ids, skip_special_tokens=skip_special_tokens)

    stream = TextStream(Counting())  # type: ignore[arg-type]
    text = "".join(stream.push([broken]) for _ in range(2000)) + stream.push([], finished=True)
    assert text == "\ufffd" * 2000
    assert decoded < 2000 * 200


class TestStopsOfSpecialTokens:
    """A special token has no text, and ends the answer all the same when a stop string names it."""

    END = property(lambda self: tokenizer().convert_tokens_to_ids(SPECIAL))

    @pytest.mark.parametrize("size", [1, 2, 9])
    def test_alone(self, size: int) -> None:
        ids = [*ids_of("ab"), self.END, *ids_of("c")]
        pieces, texts = stream(ids, (SPECIAL,), (size,))
        assert ("".join(pieces), texts.stopped) == ("ab", SPECIAL)

    @pytest.mark.parametrize(
        ("stop", "expected"),
        [
            (f"b{SPECIAL}", "a"),
            (f"{SPECIAL}\nUser:", "ab"),
            (f"b{SPECIAL}\nUser", "a"),
            (f"{SPECIAL}{SPECIAL}", None),
            (f"a{SPECIAL}", None),
            ("b\nUser", "a"),  # what the text shows
        ],
    )
    def test_among_letters(self, stop: str, expected: str | None) -> None:
        ids = [*ids_of("ab"), self.END, *ids_of("\nUser: x")]
        for sizes in ((1,), (3,), (len(ids),)):
            pieces, texts = stream(ids, (stop,), sizes)
            told = ("ab\nUser: x", None) if expected is None else (expected, stop)
            assert ("".join(pieces), texts.stopped) == told

    def test_its_letters_are_met_too(self) -> None:
        pieces, texts = stream(bytes_of(f"ab{SPECIAL}c"), (SPECIAL,))
        assert ("".join(pieces), texts.stopped) == ("ab", SPECIAL)

    @given(STOPPABLE, st.lists(st.integers(0, 13), max_size=3), SIZES)
    @settings(deadline=None)
    def test_a_stop_that_is_not_met_changes_no_text(self, text: str, places: list[int], sizes: tuple[int, ...]) -> None:
        ids = bytes_of(text)
        for place in places:
            ids.insert(min(place, len(ids)), self.END)
        pieces, _ = stream(ids, (f"{SPECIAL}z", "zz"), sizes)
        assert "".join(pieces) == text

    def test_white_space_around_it_is_dropped_where_ends_are(self) -> None:
        texts = TextStream(tokenizer(), (f"{SPECIAL}z",), strip=True)
        ids = [self.END, *ids_of(" "), *ids_of("a b"), *ids_of("  "), self.END, *ids_of(" ")]
        assert "".join([*(texts.push([one]) for one in ids), texts.push([], finished=True)]) == "a b"


def test_where_no_stop_is_looked_for_nothing_is_held_or_cut() -> None:
    texts = TextStream(tokenizer(), ("ab",))
    assert [texts.push([one], search=False) for one in bytes_of("xaba")] == list("xaba")
    assert [texts.push([one]) for one in bytes_of("bcab")] == ["b", "c", "", ""]  # the first a was given out already
    assert texts.stopped == "ab"
