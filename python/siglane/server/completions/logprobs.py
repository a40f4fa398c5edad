"""Log-probabilities as OpenAI's completions report them: columns, one row a token."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Collection, Sequence

from siglane.server.completions.protocol import LegacyLogprobs
from siglane.server.logprobs import LEAST, TokenTexts
from siglane.types import Readout, TokenLogprob


class Columns:
    """The columns of one choice, filled as its tokens come. hidden: special tokens, which texts do not show."""

    def __init__(self, texts: TokenTexts, hidden: Collection[int]) -> None:
        self._texts, self._hidden = texts, hidden
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._offset = 0
        self._new = _empty()

    def add_prompt(self, text: str, ids: Sequence[int], readouts: Sequence[Readout]) -> None:
        """The echoed prompt. readouts: of all its places but the last, each of the token that follows there."""
        self._add(ids[0], None, None, text)
        for token_id, readout in zip(ids[1:], readouts, strict=True):
            self._add(token_id, readout.logprobs[0], readout.top, text)

    def add(self, entries: Sequence[TokenLogprob]) -> None:
        for entry in entries:
            self._add(entry.token_id, entry.logprob, entry.top, None)

    def take(self) -> LegacyLogprobs:
        """What has been added since the last call."""
        new, self._new = self._new, _empty()
        return new

    def _add(
        self, token_id: int, logprob: float | None, top: Sequence[tuple[int, float]] | None, shown: str | None
    ) -> None:
        """shown: the text of a prompt, where special tokens stand or do not; None for an answer's, which hides them."""
        new, word = self._new, self._word(token_id)
        new["tokens"].append(word)
        new["text_offset"].append(self._offset)
        new["token_logprobs"].append(None if logprob is None else max(logprob, LEAST))
        new["top_logprobs"].append(None if logprob is None else self._by_text([(token_id, logprob), *(top or ())]))
        if token_id not in self._hidden or (shown is not None and shown.startswith(word, self._offset)):
            self._offset += len(self._decoder.decode(self._texts.bytes_of(token_id)))

    def _by_text(self, pairs: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Of tokens with one text, as parts of characters have, the likeliest."""
        found: dict[str, float] = {}
        for token_id, logprob in pairs:
            word = self._word(token_id)
            found[word] = max(logprob, found.get(word, LEAST))
        return found

    def _word(self, token_id: int) -> str:
        return self._texts.bytes_of(token_id).decode("utf-8", "replace")


def _empty() -> LegacyLogprobs:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
