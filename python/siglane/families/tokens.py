"""Token ids that several families find in the same places."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from siglane.errors import ConfigError
from siglane.weights.hub import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GENERATION = "generation_config.json"


def end_of_answer(folder: Checkpoint, tokenizer: PreTrainedTokenizerFast, *tokens: str) -> tuple[int, ...]:
    """The ids that end an answer: those generation_config.json states, then those of `tokens` the tokenizer has.

    ConfigError when there is none.
    """
    stated: Any = folder.json(GENERATION).get("eos_token_id") if folder.has(GENERATION) else None
    found = list(stated) if isinstance(stated, list) else [] if stated is None else [stated]
    vocabulary = tokenizer.get_vocab()
    found += [vocabulary[token] for token in tokens if token in vocabulary]
    if not found or not all(type(token) is int and token >= 0 for token in found):
        raise ConfigError(f"{folder.root}: no usable end-of-answer token in {GENERATION} or the tokenizer")
    return tuple(dict.fromkeys(found))
