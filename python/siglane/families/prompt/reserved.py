"""Reserved strings: an added token of the tokenizer or a placeholder of an image or video, never a user's words.

Before a chat template runs, every reserved string of a message is broken by a random mark, so that the reserved strings
of the rendered prompt are all the template's own. Splitting the prompt at them takes the marks away again.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken


def new_mark() -> str:
    """A text that nobody can have written: 128 random bits between two characters of private use."""
    return f"\ue000{secrets.randbits(128)}\ue001"


class ReservedStrings:
    """The strings that mean more than their letters: how to break them in a text, how to find them in a prompt."""

    def __init__(self, tokens: Sequence[AddedToken], *others: str) -> None:
        self._strips_left = {token.content for token in tokens if token.lstrip}
        self._strips_right = {token.content for token in tokens if token.rstrip}
        # the tokenizer searches for the leftmost one, and for the longest of those
        self._strings = sorted({*(token.content for token in tokens), *others}, key=len, reverse=True)
        self._anywhere = re.compile(f"(?={_either(map(re.escape, self._strings))})")
        self._heads = tuple({text[:length] for text in self._strings for length in range(1, len(text))})
        self._tails = tuple({text[start:] for text in self._strings for start in range(1, len(text))})

    def broken(self, text: str, mark: str) -> str:
        """`text` with `mark` inside every reserved string, and where the text around it could complete one."""
        pieces, start = [], 0
        for found in self._anywhere.finditer(text):
            pieces += [text[start : found.start() + 1], mark]
            start = found.start() + 1
        inside = "".join([*pieces, text[start:]])
        before = mark if text.startswith(self._tails) else ""
        after = mark if text.endswith(self._heads) or any(text in string for string in self._strings) else ""
        return before + inside + after

    def split(self, rendered: str, mark: str) -> list[str]:
        """Plain text and reserved strings in turn, plain first and last; the plain text without its marks.

        A reserved string of one letter cannot be broken inside: the mark behind it says that it is not the template's.
        """
        long = [re.escape(string) for string in self._strings if len(string) > 1]
        short = [f"{re.escape(string)}(?!{mark})" for string in self._strings if len(string) == 1]
        pieces = [_without(mark, piece) for piece in re.split(_either(long + short), rendered)]
        for place in range(1, len(pieces), 2):
            if pieces[place] in self._strips_left:
                pieces[place - 1] = pieces[place - 1].rstrip()
            if pieces[place] in self._strips_right:
                pieces[place + 1] = pieces[place + 1].lstrip()
        return pieces


def _without(mark: str, text: str) -> str:
    """A template may have written the text as JSON, with escapes or without."""
    return text.replace(mark, "").replace(json.dumps(mark)[1:-1], "")


def _either(patterns: Iterable[str]) -> str:
    """A group that matches one of `patterns`, nothing when there are none."""
    return f"({'|'.join(patterns) or '(?!)'})"
