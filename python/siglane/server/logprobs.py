"""Log-probabilities as OpenAI reports them: every token as text and as the bytes it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from siglane.server.replies import ChoiceLogprobs, TopLogprob
from siglane.types import TokenLogprob

LEAST = -9999.0  # of a token that the request's own bias or filters forbid, which has -inf: JSON cannot say it


class Vocabulary(Protocol):
    """The part of a transformers tokenizer that is used here."""

    def convert_ids_to_tokens(self, ids: int) -> str | list[str]: ...


class TokenTexts:
    """Token ids to bytes, remembered."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._alphabet = byte_alphabet()
        self._known: dict[int, bytes] = {}

    def report(self, logprobs: Sequence[TokenLogprob]) -> ChoiceLogprobs:
        content = [
            {
                **self._entry(entry.token_id, entry.logprob),
                "top_logprobs": [self._entry(token_id, logprob) for token_id, logprob in entry.top],
            }
            for entry in logprobs
        ]
        return {"content": content, "refusal": None}  # type: ignore[typeddict-item]

    def _entry(self, token_id: int, logprob: float) -> TopLogprob:
        data = self.bytes_of(token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, LEAST), "bytes": list(data)}

    def bytes_of(self, token_id: int) -> bytes:
        if token_id not in self._known:
            token = self._vocabulary.convert_ids_to_tokens(token_id)
            # vocabularies are padded: the model knows ids that the tokenizer has no name for
            self._known[token_id] = self._bytes(token) if isinstance(token, str) else b""
        return self._known[token_id]

    def _bytes(self, token: str) -> bytes:
        if all(letter in self._alphabet for letter in token):
            return bytes(self._alphabet[letter] for letter in token)
        return token.encode("utf-8", "replace")  # an added token with letters of its own


def byte_alphabet() -> dict[str, int]:
    """The letters of byte-level BPE vocabularies: printable bytes stand for themselves, the others for 256, 257, ..."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + number): byte for number, byte in enumerate(others)}
