"""A model's tokens as llguidance reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerFast

from siglane.errors import UserError
from siglane.families.prompt.reserved import new_mark

if TYPE_CHECKING:
    from llguidance import LLTokenizer

Facts = dict[str, Any]


def grammar_tokens(tokenizer: PreTrainedTokenizerFast, vocab_size: int, ends: Sequence[int]) -> LLTokenizer:
    """vocab_size: of the model; ends: ids that end an answer. UserError where it cannot read the tokenizer."""
    import llguidance

    backend = tokenizer.backend_tokenizer
    facts = _unwritable(json.loads(backend.to_str()) | {"padding": None, "truncation": None})
    known = max(vocab_size, backend.get_vocab_size(with_added_tokens=True))  # media may lie above the model's
    try:
        return llguidance.LLTokenizer(json.dumps(facts), n_vocab=known, eos_token=list(ends))
    except Exception as error:
        message = f"this model's tokenizer cannot be held to a grammar ({error})"
        raise UserError(message, code="unsupported_field") from error


def _unwritable(facts: Facts) -> Facts:
    """The tokenizer with other names for the tokens that are no text to llguidance, such as `<tool_call>`.

    Where a grammar leaves one text, llguidance cuts it into tokens, finds such a name in it, allows that token alone
    and does not take it: an answer would repeat it for ever. With names that no text has it allows the name's letters.
    """
    mark = new_mark()
    names = {
        token["content"]: f"<{mark}{token['id']}>"
        for token in facts["added_tokens"]
        if token["special"] or (token["content"].startswith("<") and token["content"].endswith(">"))
    }
    added = [token | {"content": names.get(token["content"], token["content"])} for token in facts["added_tokens"]]
    return facts | {"added_tokens": added, "model": _renamed(facts["model"], names)}


def _renamed(model: Facts, names: Mapping[str, str]) -> Facts:
    """The model with those of the names that are in its vocabulary, which is a list where pieces have scores."""
    vocabulary, unknown = model["vocab"], model.get("unk_token")
    if isinstance(vocabulary, dict):
        renamed: Any = {names.get(text, text): number for text, number in vocabulary.items()}
    else:
        renamed = [[names.get(text, text), score] for text, score in vocabulary]
    return model | {"vocab": renamed} | ({"unk_token": names.get(unknown, unknown)} if unknown else {})
