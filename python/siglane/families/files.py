"""Facts that several families find in the same files."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from siglane.config.reader import ConfigReader
from siglane.config.vision import VisionConfig
from siglane.config.vlm import Thinking
from siglane.errors import ConfigError
from siglane.families.stated import GENERATION, end_ids
from siglane.types import SamplingParams
from siglane.weights.hub import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

# fields of `SamplingParams`, under the names that transformers gives them, and the types of their values
SAMPLING: Mapping[str, tuple[str, type[int] | type[float]]] = {
    "temperature": ("temperature", float),
    "top_p": ("top_p", float),
    "top_k": ("top_k", int),
    "min_p": ("min_p", float),
    "repetition_penalty": ("repetition_penalty", float),
    "max_new_tokens": ("max_tokens", int),
}
# what else changes transformers' answers, and the value with which it does not
UNREAD: Mapping[str, Any] = {
    "bad_words_ids": [], "begin_suppress_tokens": [], "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "guidance_scale": 1.0, "max_time": None, "min_length": 0, "min_new_tokens": 0, "no_repeat_ngram_size": 0,
    "num_beams": 1, "sequence_bias": {}, "stop_strings": [], "suppress_tokens": [], "token_healing": False,
    "top_h": None, "typical_p": 1.0, "watermarking_config": {},
}  # fmt: skip
TOWER_TYPE = "siglip_vision_model"
END_OF_DOCUMENT = "</doctag>"  # the tags of a document that a model writes down are special tokens where it has them
THINK_START, THINK_END = "<think>", "</think>"

# what Qwen3 and Ovis2.5 are made to say when their thinking budget is spent
FORCED_END = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
    "</think>\n\n"
)


def llava_tower(reader: ConfigReader, feature_layer: int) -> VisionConfig:
    """A `SiglipVisionConfig` whose features are read at a layer, without the last norm and the head, as LLaVA and VILA
    do. ConfigError for another tower."""
    reader.only("model_type", TOWER_TYPE)
    return VisionConfig.from_hf(reader.raw, feature_layer=feature_layer, post_norm=False, head=False, name=reader.name)


def check_rows(side: int, factor: int, place: str, stated: ConfigReader, key: str) -> None:
    """ConfigError where pixel shuffle by `factor` does not divide a tile of side x side patches, or where `stated`
    counts other rows of it. place: of the factor, for the message."""
    if not side or side % factor:
        raise ConfigError(f"{place} {factor} does not divide {side}x{side} patches")
    rows = (side // factor) ** 2
    if stated.size(key, rows) != rows:
        raise ConfigError(f"{stated.name}: {key} {stated.size(key)} is not the {rows} rows that a tile has")


def end_of_answer(
    folder: Checkpoint, tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str | None]
) -> tuple[int, ...]:
    """The ids that end an answer: those the files state (`end_ids`), then those of `tokens` the tokenizer has.

    ConfigError when there is none.
    """
    stated = end_ids(folder)
    vocabulary = tokenizer.get_vocab()
    found = [*(stated[0].value if stated else ()), *(vocabulary[token] for token in tokens if token in vocabulary)]
    if not found:
        raise ConfigError(f"{folder.root}: no end-of-answer token in {GENERATION}, config.json or the tokenizer")
    return tuple(dict.fromkeys(found))


def stated_sampling(folder: Checkpoint) -> dict[str, Any]:
    """The fields of `SamplingParams` that generation_config.json states; null and a missing file state nothing.

    Read as vLLM and SGLang do: the values apply where they stand, and `do_sample` is not asked, which transformers'
    `generate` alone gives a meaning. ConfigError for a value that cannot be used, naming the file.
    """
    reader = ConfigReader(folder.optional(GENERATION), str(folder.path(GENERATION)))
    if unread := [name for name, idle in UNREAD.items() if reader.raw.get(name) not in (None, idle)]:
        logger.warning("%s: %s would change transformers' answers and is not read", reader.name, ", ".join(unread))
    stated = {name: known for name, known in SAMPLING.items() if reader.has(name)}
    found: dict[str, Any] = {field: reader.value(name, kind) for name, (field, kind) in stated.items()}
    complaint = SamplingParams(**found).complaint()
    if complaint is not None:
        raise ConfigError(f"{reader.name}: {complaint[1]}")
    return found


def thinking_of(tokenizer: PreTrainedTokenizerFast) -> Thinking | None:
    """None for a tokenizer without the tokens that Qwen3 marks its reasoning with."""
    vocabulary = tokenizer.get_vocab()
    if THINK_START not in vocabulary or THINK_END not in vocabulary:
        return None
    forced = tokenizer(FORCED_END, add_special_tokens=False).input_ids
    return Thinking(vocabulary[THINK_START], vocabulary[THINK_END], tuple(forced))
