"""Token ids to text as they come: whole characters only, stop strings cut exactly."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

MOST_HELD_TOKENS = 16


class TextStream:
    """Turns one answer's tokens into text that may be sent.

    Text is held back while it ends inside a UTF-8 character or could be the beginning of a stop string. After a stop
    string was met, `stopped` names it, the text before it has been returned, and nothing follows.
    strip: drop white space at the beginning, before stop strings are looked for, and at the end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str] = (), *, strip: bool = False) -> None:
        self._tokenizer, self._stop, self._strip = tokenizer, tuple(stop), strip
        self._ids: list[int] = []
        self._context, self._read = 0, 0  # ids before _context are settled, before _read already returned as text
        self._held, self._begun = "", False
        self.stopped: str | None = None

    def push(self, token_ids: Sequence[int], finished: bool = False) -> str:
        """Adds tokens, returns the new text; `finished` releases what is held back."""
        if self.stopped is not None:
            return ""
        self._ids.extend(token_ids)
        self._held += self._new_text(finished)
        if self._strip and not self._begun:
            self._held = self._held.lstrip()
            self._begun = bool(self._held)
        found = ((self._held.find(stop), stop) for stop in self._stop if stop in self._held)
        # the first to be complete, as if the text came character by character: tokens may bring several at once
        cut = min(((start + len(stop), start, stop) for start, stop in found), default=None)
        if cut is not None:
            _, start, self.stopped = cut
            text, self._held = self._held[:start], ""
            return text.rstrip() if self._strip else text
        keep = 0 if finished else self._beginning_of_stop()
        text = self._held[: len(self._held) - keep]
        if self._strip:
            text = text.rstrip()
        self._held = "" if finished else self._held[len(text) :]
        return text

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
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)  # a list only for a list of lists
        return text

    def _beginning_of_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=0)
        return next(
            (
                length
                for length in range(min(longest - 1, len(self._held)), 0, -1)
                if any(stop.startswith(self._held[-length:]) for stop in self._stop)
            ),
            0,
        )
