"""What a family of checkpoints states about itself. `families/registry.py` lists the families."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from siglane.config.images import ImageFacts
from siglane.config.language import LanguageConfig
from siglane.config.reader import RawConfig
from siglane.config.vlm import Thinking, VlmConfig
from siglane.families.files import END_OF_DOCUMENT, end_of_answer, stated_sampling, thinking_of
from siglane.families.stated import stated_classes
from siglane.lm.qwen import qwen_plan
from siglane.nn.plan import WeightPlan
from siglane.projector.build import projector_plan
from siglane.vision.tower import tower_plan
from siglane.weights.hub import Checkpoint, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TURN = "<|im_end|>"


def chatml(content: str) -> str:
    """The turns of Qwen's models and of those trained after them. content: Jinja code that writes a message's."""
    return (
        "{% for message in messages %}{{ '<|im_start|>' ~ message['role'] ~ '\n' }}"
        + content
        + "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


CHATML = chatml("{{ message['content'] }}")


@dataclass(frozen=True, slots=True)
class PromptRules:
    """default_template: used when the tokenizer has none; template: used whatever the tokenizer has ("": its own or the
    default); images_first: a message's images stand in front of its text; strip_messages: white space around each whole
    message, its images written out, is dropped; joint: what stands between the parts of a message when the template
    takes one text; thinking_end: of an assistant's turn only what follows it is kept ("": everything); video_template:
    used for conversations with a video ("": the same as for all others); prologue: Jinja code in front of whichever is
    used, which ends with a line feed; video_text: what a template gets as a text where a message has a video ("": a
    part that says so).
    """

    default_template: str
    strip_messages: bool
    template: str = ""
    images_first: bool = False
    joint: str = ""
    thinking_end: str = ""
    video_template: str = ""
    prologue: str = ""
    video_text: str = ""


class Family(ABC):
    """Checkpoints that announce themselves alike. Every method is a pure function of a checkpoint's files.

    known_as: how they announce themselves, for messages.
    """

    name: ClassVar[str]
    known_as: ClassVar[tuple[str, ...]]

    @abstractmethod
    def matches(self, root: RawConfig, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint with this config.json is one of them."""


class TowerFamily(Family):
    """SigLIP towers without a language model."""

    @abstractmethod
    def images(self, checkpoint: Checkpoint, *, head: bool = False) -> ImageFacts:
        """The facts. head: keep the MAP pooling head where the checkpoint has one."""

    @abstractmethod
    def plan(self, images: ImageFacts) -> WeightPlan:
        """Checkpoint names -> `VisionEncoderModel`."""


class VlmFamily(Family):
    """Models that answer. What most families share is written here; a family states its difference.

    tower_prefix, projector_prefix, language_prefix: what the names of each part's tensors start with; decoder: and,
    behind that, of the language model's but for its head; one_table: a tied head has no values of its own in the
    original's code, so that a file in which it has is refused; tied_at_root: `tie_word_embeddings` of a section of
    config.json counts for nothing; eos_ends: answers end with the tokenizer's `eos_token`, else with `END_OF_TURN`;
    thinks: as Qwen3 does, where the tokenizer has the tokens.
    """

    tower_prefix: ClassVar[str] = ""
    projector_prefix: ClassVar[str] = ""
    language_prefix: ClassVar[str] = ""
    decoder: ClassVar[str] = "model."
    one_table: ClassVar[bool] = False
    tied_at_root: ClassVar[bool] = False
    eos_ends: ClassVar[bool] = False
    thinks: ClassVar[bool] = False

    def matches(self, root: RawConfig, checkpoint: Checkpoint) -> bool:
        return root.get("model_type") == self.name or not set(self.known_as).isdisjoint(stated_classes(root))

    @abstractmethod
    def images(self, checkpoint: Checkpoint) -> ImageFacts | None:
        """From the JSON files alone; None for a model without eyes. ConfigError names the key that is missing,
        unknown or contradictory."""

    @abstractmethod
    def language(self, checkpoint: Checkpoint) -> LanguageConfig:
        """ConfigError as `images`."""

    @abstractmethod
    def prompt_rules(self, checkpoint: Checkpoint) -> PromptRules:
        """How messages become text."""

    def vision_plan(self, images: ImageFacts) -> WeightPlan:
        """Checkpoint names -> `VisionStack`."""
        tower = tower_plan(images.vision).under(self.tower_prefix, "encoder.tower.")
        return tower + projector_plan(images.projector).under(self.projector_prefix, "projector.")

    def language_plan(self, language: LanguageConfig) -> WeightPlan:
        """Checkpoint names -> `QwenModel`."""
        return qwen_plan(language, self.decoder).under(self.language_prefix, "")

    def config(self, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerFast) -> VlmConfig:
        """All facts. ConfigError as `images`, and for a tokenizer that is not the model's."""
        language = self.language(checkpoint)
        return VlmConfig(
            family=self.name,
            images=self.images(checkpoint),
            language=language,
            image_token=self.image_token(checkpoint),
            image_token_id=self.image_token_id(checkpoint, tokenizer, language),
            eos_token_ids=end_of_answer(self.language_folder(checkpoint), tokenizer, self.ends(tokenizer)),
            thinking=self.thinking(tokenizer),
            sampling=stated_sampling(self.language_folder(checkpoint)),
            special_tokens_are_text=END_OF_DOCUMENT in tokenizer.get_vocab(),
        )

    def plan(self, config: VlmConfig) -> WeightPlan:
        """Checkpoint names -> `VisionLanguageModel`."""
        language = self.language_plan(config.language).under("", "language.")
        if config.images is None:
            return language
        return self.vision_plan(config.images).under("", "vision.") + language

    def image_token(self, checkpoint: Checkpoint) -> str:
        """What stands for an image in a rendered prompt."""
        return "<image>"

    def image_token_id(
        self, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerFast, language: LanguageConfig
    ) -> int:
        """An id outside the embedding table, neither looked up nor ever an answer, where no file states one."""
        return max(language.vocab_size, len(tokenizer))

    def ends(self, tokenizer: PreTrainedTokenizerFast) -> Sequence[str | None]:
        """The tokens that end an answer beside those of generation_config.json."""
        return (tokenizer.eos_token if self.eos_ends else END_OF_TURN,)

    def thinking(self, tokenizer: PreTrainedTokenizerFast) -> Thinking | None:
        return thinking_of(tokenizer) if self.thinks else None

    def language_folder(self, checkpoint: Checkpoint) -> Checkpoint:
        """Where the language model's own files lie."""
        return checkpoint

    def has_processor(self, checkpoint: Checkpoint) -> bool:
        """Whether its reference takes the chat template from a processor; else from the tokenizer."""
        return False

    def tokenizer_folder(self, checkpoint: Checkpoint) -> Checkpoint:
        return self.language_folder(checkpoint)

    def added_tokens(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """The special tokens that the checkpoint's files add to that tokenizer, in the order of their ids."""
        return ()

    def vision_sources(self, checkpoint: Checkpoint) -> tuple[Source, ...]:
        """The folders that hold the tensors of `vision_plan`."""
        return (Source(checkpoint),)

    def language_sources(self, checkpoint: Checkpoint) -> tuple[Source, ...]:
        """The folders that hold the tensors of `language_plan`."""
        return (Source(checkpoint),)
