"""Token ids to text as they come: whole characters only, stop strings cut exactly."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from transformers import PreTrainedTokenizerFast

MOST_HELD_TOKENS = 16
FIRST_MARK = 0xD800  # half of a surrogate pair: no text that a tokenizer writes holds one
MOST_MARKS = 2048


class TextStream:
    """Turns one answer's tokens into text that may be sent.

    Text is held back while it ends inside a UTF-8 character or could be the beginning of a stop string. After a stop
    string was met, `stopped` names it, the text before it has been returned, and nothing follows. A stop string that
    holds a special token is met by the token as by its letters, although the text never shows it.
    strip: drop white space at the beginning, before stop strings are looked for, and at the end; skip_special: special
    tokens have no text, but for those that are shown.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        stop: Sequence[str] = (),
        *,
        strip: bool = False,
        skip_special: bool = True,
        shown: Collection[str] = (),
    ) -> None:
        self._tokenizer, self._strip, self._skip_special = tokenizer, strip, skip_special
        added = tokenizer.added_tokens_decoder.items() if shown and skip_special else ()
        self._shown = {number: token.content for number, token in added if token.special and token.content in shown}
        # in the held text they stand for special tokens that it does not show
        self._marks = _marks_of(tokenizer, stop, shown) if skip_special else {}
        self._stop = _patterns(
            stop, {tokenizer.added_tokens_decoder[one].content: mark for one, mark in self._marks.items()}
        )
        self._ids: list[int] = []
        self._context, self._read = 0, 0  # ids before _context are settled, before _read already returned as text
        self._held, self._begun = "", False
        self.stopped: str | None = None

    def push(self, token_ids: Sequence[int], finished: bool = False, *, search: bool = True) -> str:
        """Adds tokens, returns the new text; `finished` releases what is held back. search: whether a stop string may
        stand in their text."""
        shown = [self._take((token_id,), False, search) for token_id in token_ids]
        return "".join(shown) + (self._take((), True, search) if finished else "")

    def _take(self, token_ids: tuple[int, ...], finished: bool, search: bool) -> str:
        if self.stopped is not None:
            return ""
        self._ids.extend(token_ids)
        words = "".join(self._shown.get(token_id, "") for token_id in token_ids)
        new = self._new_text(finished or bool(words)) + words
        if self._strip and not self._begun:
            new = new.lstrip()
            self._begun = bool(new)
        self._held += new + "".join(self._marks.get(token_id, "") for token_id in token_ids)
        found = [(self._held.find(words), words, stop) for words, stop in self._stop if search and words in self._held]
        # the first to be complete, as if the text came character by character: tokens may bring several at once
        cut = min(((start + len(words), start, stop) for start, words, stop in found), default=None)
        if cut is not None:
            _, end, self.stopped = cut
        else:
            end = len(self._held) - (0 if finished or not search else self._beginning_of_stop())
        text = self._trimmed(self._held[:end]) if self._strip else self._held[:end]
        self._held = "" if finished or self.stopped is not None else self._held[len(text) :]
        return text.translate(dict.fromkeys(map(ord, self._marks.values())))

    def _trimmed(self, text: str) -> str:
        """Without white space at its end, also where special tokens stand behind it."""
        shorter = text.rstrip().rstrip("".join(self._marks.values()))
        return shorter if shorter == text else self._trimmed(shorter)

    def _new_text(self, finished: bool) -> str:
        """A token's text depends on its neighbours (spaces, split characters): decode with context, subtract that."""
        before = self._decode(self._ids[self._context : self._read])
        now = self._decode(self._ids[self._context :])
        if len(now) <= len(before):
            return ""
        stop = len(self._ids)
        if now.endswith("\ufffd") and not finished:  # a character may be incomplete
            stop = self._settled(now)
            if stop <= self._read:
                return ""
            now = self._decode(self._ids[self._context : stop])
        self._context, self._read = self._read, stop
        return now[len(before) :]

    def _settled(self, now: str) -> int:
        """Where the ids that cannot change any more end, when many wait behind a broken character.

        A character has at most four bytes, so the split lies near the end; it is clean where both sides decode to
        what the whole does. Without it an answer of nothing but broken bytes would be decoded from its start for
        every token.
        """
        end = len(self._ids)
        if end - self._read <= MOST_HELD_TOKENS:
            return self._read
        for split in range(end - 1, end - 5, -1):
            if self._decode(self._ids[self._context : split]) + self._decode(self._ids[split:]) == now:
                return split
        return self._read

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=self._skip_special)
        assert isinstance(text, str)  # a list only for a list of lists
        return text

    def _beginning_of_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(words) for words, _ in self._stop), default=0)
        return next(
            (
                length
                for length in range(min(longest - 1, len(self._held)), 0, -1)
                if any(words.startswith(self._held[-length:]) for words, _ in self._stop)
            ),
            0,
        )


def _marks_of(tokenizer: PreTrainedTokenizerFast, stop: Sequence[str], shown: Collection[str]) -> dict[int, str]:
    """A character for each special token that a stop string names, by the token's id: no text shows such tokens."""
    added = tokenizer.added_tokens_decoder.items() if stop else ()
    hidden = [(number, token.content) for number, token in added if token.special and token.content not in shown]
    named = [number for number, content in hidden if any(content in one for one in stop)]
    return {number: chr(FIRST_MARK + place) for place, number in enumerate(named[:MOST_MARKS])}


def _patterns(stop: Sequence[str], marks: Mapping[str, str]) -> list[tuple[str, str]]:
    """What to look for, and which stop string it is: its letters, and its letters with the special tokens' marks."""
    contents = sorted(marks, key=len, reverse=True)  # of those that begin alike the longest, as tokenizers do
    named = re.compile("|".join(map(re.escape, contents)) or "(?!)")
    marked = [(named.sub(lambda found: marks[found.group()], one), one) for one in stop]
    return list(dict.fromkeys([*((one, one) for one in stop), *marked]))
