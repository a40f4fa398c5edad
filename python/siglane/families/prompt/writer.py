"""Token ids of a prompt and the spans that its images fill, in one pass over text, special tokens and images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import assert_never

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from siglane.errors import ConfigError
from siglane.types import ImagePlaceholder, ImageSpan, Indicator, Marker, Piece, Token


class PlainTokenizer:
    """The same normaliser, splitter and vocabulary as a tokenizer's, but every text is only text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        definition = json.loads(tokenizer.backend_tokenizer.to_str())
        definition.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        self._first = self._following = Tokenizer.from_str(json.dumps(definition))
        splitter = definition["pre_tokenizer"] or {}
        steps = [step for step in (splitter, *splitter.get("pretokenizers", ())) if "prepend_scheme" in step]
        if any(step["prepend_scheme"] == "first" for step in steps):
            for step in steps:
                step["prepend_scheme"] = "never"
            self._following = Tokenizer.from_str(json.dumps(definition))

    def ids(self, text: str, *, first: bool) -> list[int]:
        """first: whether the text begins the prompt; Llama 2's tokenizer puts a space there and nowhere else."""
        ids: list[int] = (self._first if first else self._following).encode(text, add_special_tokens=False).ids
        return ids


class PromptWriter:
    """Collects ids. Text is held back until something that is not text follows, so that neighbours join.

    plain: for text; special_ids: of the added tokens, by their text; spans: of the images so
    far, numbered as they come.
    """

    def __init__(self, plain: PlainTokenizer, special_ids: Mapping[str, int], image_token_id: int) -> None:
        self.spans: list[ImageSpan] = []
        self._plain, self._special_ids, self._image_token_id = plain, special_ids, image_token_id
        self._ids: list[int] = []
        self._text: list[str] = []
        self._images = 0

    def text(self, text: str) -> None:
        self._text.append(text)

    def special(self, text: str) -> None:
        """The added token that is written `text`."""
        self._flush()
        self._ids.append(self._special_ids[text])

    def image(self, pieces: Sequence[Piece]) -> None:
        """The next image. ConfigError for a token beside it that the tokenizer does not have."""
        for piece in pieces:
            match piece:
                case ImagePlaceholder(rows):
                    self._rows(rows)
                case Indicator():
                    self._rows(1)
                case Token(text) if text in self._special_ids:
                    self.special(text)
                case Token(text, or_text=False):
                    raise ConfigError(f"the tokenizer has no token {text!r}, which this model puts beside images")
                case Marker(text, isolated=True):
                    self._flush()
                    self._ids += self._encode(text)
                case Marker(text) | Token(text):
                    self.text(text)
                case _:
                    assert_never(piece)
        self._images += 1

    def finish(self) -> tuple[int, ...]:
        self._flush()
        return tuple(self._ids)

    def _rows(self, rows: int) -> None:
        """Placeholders; those that follow each other directly are one span."""
        self._flush()
        start = len(self._ids)
        if self.spans and self.spans[-1].stop == start and self.spans[-1].image == self._images:
            start = self.spans.pop().start
        self._ids += [self._image_token_id] * rows
        self.spans.append(ImageSpan(start, len(self._ids), self._images))

    def _flush(self) -> None:
        self._ids += self._encode("".join(self._text))
        self._text.clear()

    def _encode(self, text: str) -> list[int]:
        return self._plain.ids(text, first=not self._ids)
