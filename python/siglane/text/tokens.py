"""Texts -> ids exactly as the text tower was trained on them (formats.md 1.6, 2.1)."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from siglane.config.two_tower import TextRule

_SPACE_PIECE = "▁"  # what a space is called inside SentencePiece
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True)
class TextTokens:
    """encode: text -> ids, without any special token."""

    rule: TextRule
    encode: Callable[[str], list[int]]

    def prepared(self, text: str) -> str:
        """What of a text reaches the tokenizer.

        Sources: transformers `SiglipTokenizer.canonicalize_text`, and `Siglip2Tokenizer`'s Lowercase normalizer.
        """
        match self.rule.lowercase:
            case "text":
                text = text.lower()
            case "characters":
                text = "".join(map(str.lower, text))
        if not self.rule.delete_punctuation:
            return text
        return " ".join(text.replace(_SPACE_PIECE, " ").translate(_WITHOUT_PUNCTUATION).split())

    def ids(self, texts: Sequence[str]) -> torch.Tensor:
        """i64 `[texts, rule.length]`."""
        return torch.tensor([self._row(text) for text in texts]).reshape(len(texts), self.rule.length)

    def kept(self, text: str) -> int:
        """How many of its tokens a text keeps; fewer than `count` when it is longer than the model reads."""
        return min(self.count(text), self.rule.length - 1)

    def count(self, text: str) -> int:
        return len(self.encode(self.prepared(text)))

    def lost(self, text: str) -> int:
        """How many of its tokens a text loses to the model's length."""
        prepared = self.prepared(text)
        # a token of ASCII is at least one byte; one more may stand in front, the end behind
        if prepared.isascii() and len(prepared) + 2 <= self.rule.length:
            return 0
        return max(0, len(self.encode(prepared)) - (self.rule.length - 1))

    def _row(self, text: str) -> list[int]:
        ids = [*self.encode(self.prepared(text))[: self.rule.length - 1], self.rule.end_id]
        return ids + [self.rule.pad_id] * (self.rule.length - len(ids))


def is_unicode(text: str) -> bool:
    """Whether `text` can be encoded: half a surrogate pair, as JSON may state one, is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
