"""Guesses of what an answer says next: what followed its last words where they stood before, in prompt or answer.

Answers about a document repeat its words. Several guessed tokens are read in one step, in the time of hardly more than
one, and kept as far as they are what the request would have chosen; so a guess changes no answer (prompt lookup
decoding, github.com/apoorvumang/prompt-lookup-decoding; "ngram" in vLLM and SGLang).
"""

from __future__ import annotations

from collections.abc import Sequence

SIZES = (3, 2)  # of the n-grams that are looked up, the longer first
FIRST_GUESS = 3  # tokens, before anything is known of how guesses fare
LONGEST_PAUSE = 32  # chances to guess that pass after guesses that were all wrong


class Lookup:
    """Of one sequence: its n-grams, and how many tokens the next guess is worth.

    A guess that was right to its end doubles the next one, one that was wrong from the start halves it and makes it
    wait, twice as long each time: text that repeats nothing costs next to nothing.
    """

    def __init__(self, most: int) -> None:
        """most: tokens of one guess."""
        self.most = most
        self.accepted = self.rejected = 0  # tokens, since the beginning
        self._worth = min(FIRST_GUESS, most)
        self._misses = self._pause = 0
        self._indexed = 0
        self._followers: dict[tuple[int, ...], int] = {}  # where the token stands that last followed an n-gram

    def guess(self, ids: Sequence[int], room: int) -> tuple[int, ...]:
        """At most `room` tokens that may follow `ids`, whose earlier ones are those of the last call. Ids below 0,
        which stand for rows of images, are neither looked up nor guessed."""
        self._index(ids)
        most = min(self._worth, room)
        start = next((self._followers[key] for key in _last_ngrams(ids) if key in self._followers), None)
        if start is None or most <= 0:
            return ()
        if self._pause:
            self._pause -= 1
            return ()
        period = len(ids) - start  # the guess itself goes on where the known tokens end
        guessed: list[int] = []
        for place in range(most):
            token_id = ids[start + place] if place < period else guessed[place - period]
            if token_id < 0:
                break
            guessed.append(token_id)
        return tuple(guessed)

    def note(self, guessed: int, accepted: int) -> None:
        """How the last guess fared."""
        self.accepted += accepted
        self.rejected += guessed - accepted
        if accepted:
            self._misses = 0
            self._worth = min(self.most, 2 * accepted if accepted == guessed else accepted + 1)
        else:
            self._misses += 1
            self._worth = max(1, self._worth // 2)
            self._pause = min(LONGEST_PAUSE, 2**self._misses)

    def _index(self, ids: Sequence[int]) -> None:
        for place in range(self._indexed, len(ids)):
            for key in _last_ngrams(ids[max(0, place - SIZES[0]) : place]):
                self._followers[key] = place
        self._indexed = len(ids)


def _last_ngrams(ids: Sequence[int]) -> list[tuple[int, ...]]:
    ngrams = (tuple(ids[-size:]) for size in SIZES if size <= len(ids))
    return [ngram for ngram in ngrams if min(ngram) >= 0]
