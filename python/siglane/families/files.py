"""Facts that several families find in the same files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from siglane.config.reader import ConfigReader
from siglane.config.vision import VisionConfig
from siglane.errors import ConfigError
from siglane.weights.hub import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GENERATION = "generation_config.json"
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
TOWER_TYPE = "siglip_vision_model"


def llava_tower(reader: ConfigReader, feature_layer: int) -> VisionConfig:
    """A `SiglipVisionConfig` whose features are read at a layer, without the last norm and the head, as LLaVA and VILA
    do. ConfigError for another tower."""
    reader.choice("model_type", {TOWER_TYPE: None}, TOWER_TYPE)
    return VisionConfig.from_hf(reader.raw, feature_layer=feature_layer, post_norm=False, head=False, name=reader.name)


def image_processor(
    folder: Checkpoint, section: str = "image_processor", file: str = PREPROCESSOR
) -> ConfigReader | None:
    """A section of processor_config.json (transformers 5), else `file` (before), as transformers chooses."""
    if folder.optional(PROCESSOR).get(section) is not None:
        return folder.reader(PROCESSOR).section(section)
    return folder.reader(file) if folder.has(file) else None


def end_of_answer(
    folder: Checkpoint, tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str | None]
) -> tuple[int, ...]:
    """The ids that end an answer: those generation_config.json states, then those of `tokens` the tokenizer has.

    ConfigError when there is none.
    """
    stated: Any = folder.optional(GENERATION).get("eos_token_id")
    found = list(stated) if isinstance(stated, list) else [] if stated is None else [stated]
    vocabulary = tokenizer.get_vocab()
    found += [vocabulary[token] for token in tokens if token in vocabulary]
    if not found or not all(type(token) is int and token >= 0 for token in found):
        raise ConfigError(f"{folder.root}: no usable end-of-answer token in {GENERATION} or the tokenizer")
    return tuple(dict.fromkeys(found))
