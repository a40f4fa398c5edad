"""Guesses from earlier text: what is looked up, how much is guessed, and when it rests."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from siglane.engine.lookup import FIRST_GUESS, LONGEST_PAUSE, Lookup


def guess(ids: Sequence[int], room: int = 8, most: int = 8, worth: int = 8) -> list[int]:
    """What a sequence that trusts its guesses makes of `ids`."""
    lookup = Lookup(most)
    lookup.note(worth // 2, worth // 2)
    return list(lookup.guess(ids, room))


class TestGuess:
    def test_it_is_what_followed_the_last_words(self) -> None:
        assert guess([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 1, 2, 3]) == [4, 5, 6, 7, 8, 9, 10, 11]

    def test_the_latest_place_counts(self) -> None:
        assert guess([1, 2, 3, 40, 0, 1, 2, 3, 50, 0, 0, 1, 2, 3], room=1) == [50]

    def test_three_words_count_more_than_two(self) -> None:
        assert guess([1, 2, 3, 40, 9, 2, 3, 50, 0, 1, 2, 3], room=1) == [40]

    def test_two_are_enough(self) -> None:
        assert guess([7, 2, 3, 40, 1, 2, 3], room=1) == [40]

    def test_a_rhythm_goes_on_beyond_what_is_known(self) -> None:
        assert guess([1, 2, 3, 1, 2, 3], room=7) == [1, 2, 3, 1, 2, 3, 1]
        assert guess([5, 5, 5], room=4) == [5, 5, 5, 5]

    @pytest.mark.parametrize("ids", [[], [1], [1, 2], [1, 2, 3, 4, 5]])
    def test_new_words_are_not_guessed(self, ids: list[int]) -> None:
        assert guess(ids) == []

    def test_rows_of_images_are_neither_looked_up_nor_guessed(self) -> None:
        assert guess([-9, -9, -9, 4, -9, -9]) == []
        assert guess([1, 2, 3, 4, -9, -9, 5, 1, 2, 3]) == [4]

    def test_a_growing_text_is_read_once_and_found_whole(self) -> None:
        ids = [random.Random(0).randrange(4) for _ in range(200)]
        growing = Lookup(4)
        for length in range(len(ids)):
            fresh = Lookup(4)
            assert growing.guess(ids[:length], 3) == fresh.guess(ids[:length], 3)


class TestHowMuch:
    IDS = (*range(50), 10, 11, 12)

    def test_at_most_what_is_allowed_and_has_room(self) -> None:
        assert len(guess(self.IDS, most=5, worth=64)) == 5
        assert len(guess(self.IDS, room=2)) == 2
        assert guess(self.IDS, room=0) == guess(self.IDS, room=-3) == []

    def test_right_guesses_grow(self) -> None:
        lookup = Lookup(16)
        sizes = []
        for _ in range(4):
            sizes.append(len(lookup.guess(self.IDS, 100)))
            lookup.note(sizes[-1], sizes[-1])
        assert sizes == [FIRST_GUESS, 6, 12, 16]
        assert (lookup.accepted, lookup.rejected) == (sum(sizes), 0)

    def test_a_guess_that_was_right_at_first_is_cut_to_that(self) -> None:
        lookup = Lookup(16)
        lookup.note(8, 2)
        assert len(lookup.guess(self.IDS, 100)) == 3
        assert (lookup.accepted, lookup.rejected) == (2, 6)

    def test_wrong_guesses_rest_longer_and_longer(self) -> None:
        lookup, pauses = Lookup(16), []
        for _ in range(7):
            lookup.note(1, 0)
            waited = 0
            while not lookup.guess(self.IDS, 100):
                waited += 1
            pauses.append(waited)
        assert pauses == [2, 4, 8, 16, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]
        lookup.note(1, 1)
        assert lookup.guess(self.IDS, 100)
