"""What a family of vision-language checkpoints states about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from siglane.config.vlm import ImageFacts, VlmConfig
from siglane.nn.plan import WeightPlan
from siglane.weights.hub import Checkpoint, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class PromptRules:
    """default_template: used when the tokenizer has none; template: used whatever the tokenizer has ("": its own or the
    default); images_first: a message's images stand in front of its text; strip_messages: white space around each whole
    message, its images written out, is dropped; joint: what stands between the parts of a message when the template
    takes one text; thinking_end: of an assistant's turn only what follows it is kept ("": everything).
    """

    default_template: str
    strip_messages: bool
    template: str = ""
    images_first: bool = False
    joint: str = ""
    thinking_end: str = ""


class ReadTower(Protocol):
    """A tower's facts from its files. head: keep the MAP pooling head where the checkpoint has one."""

    def __call__(self, checkpoint: Checkpoint, *, head: bool = False) -> ImageFacts: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerFamily:
    """A family of SigLIP towers without a language model.

    name, known_as, matches: as in `VlmFamily`; read_config: its facts; plan: checkpoint names -> `VisionEncoderModel`.
    """

    name: str
    known_as: tuple[str, ...]
    matches: Callable[[Checkpoint], bool]
    read_config: ReadTower
    plan: Callable[[ImageFacts], WeightPlan]


@dataclass(frozen=True, slots=True, kw_only=True)
class VlmFamily:
    """One family; every member is a fact or a pure function of a checkpoint's files.

    name: what `VlmConfig.family` says; known_as: how its checkpoints announce themselves, for messages;
    matches: whether a checkpoint is one of them; tokenizer_folder: where its tokenizer lies; added_tokens:
    the special tokens its own files add to that tokenizer, in the order of their ids; images: its image facts,
    for which no tokenizer is needed; config: all its facts;
    prompt_rules: how its messages become text; vision_plan: checkpoint names -> `VisionStack`; language_plan:
    checkpoint names -> `QwenModel`; vision_sources, language_sources: the folders that hold those tensors;
    language_prefix: what the names of the language model's tensors start with.
    """

    name: str
    known_as: tuple[str, ...]
    matches: Callable[[Checkpoint], bool]
    tokenizer_folder: Callable[[Checkpoint], Checkpoint]
    added_tokens: Callable[[Checkpoint], tuple[str, ...]] = field(default=lambda checkpoint: ())
    images: Callable[[Checkpoint], ImageFacts]
    config: Callable[[Checkpoint, PreTrainedTokenizerFast], VlmConfig]
    prompt_rules: Callable[[Checkpoint], PromptRules]
    vision_plan: Callable[[VlmConfig], WeightPlan]
    language_plan: Callable[[VlmConfig], WeightPlan]
    vision_sources: Callable[[Checkpoint], tuple[Source, ...]]
    language_sources: Callable[[Checkpoint], tuple[Source, ...]]
    language_prefix: str
