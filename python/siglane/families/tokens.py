"""What generation_config.json says, in every family: the ids that end an answer, and how tokens are sampled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from siglane.config.reader import ConfigReader
from siglane.errors import ConfigError
from siglane.types import SamplingParams
from siglane.weights.hub import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GENERATION = "generation_config.json"
# its names, for the field of `SamplingParams` with the same meaning and the type of its values
STATED: Mapping[str, tuple[str, type[int] | type[float]]] = {
    "temperature": ("temperature", float),
    "top_p": ("top_p", float),
    "top_k": ("top_k", int),
    "min_p": ("min_p", float),
    "repetition_penalty": ("repetition_penalty", float),
    "max_new_tokens": ("max_tokens", int),
}


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


def stated_sampling(folder: Checkpoint) -> dict[str, Any]:
    """The fields of `SamplingParams` that generation_config.json states; null and a missing file state nothing.

    Read as vLLM and SGLang do: the values apply where they stand, and `do_sample` is not asked, which transformers'
    `generate` alone gives a meaning. ConfigError for a value that cannot be used, naming the file.
    """
    if not folder.has(GENERATION):
        return {}
    reader = ConfigReader(folder.json(GENERATION), str(folder.path(GENERATION)))
    stated = {name: known for name, known in STATED.items() if reader.has(name)}
    found: dict[str, Any] = {field: reader.value(name, kind) for name, (field, kind) in stated.items()}
    complaint = SamplingParams(**found).complaint()
    if complaint is not None:
        raise ConfigError(f"{reader.name}: {complaint[1]}")
    return found
