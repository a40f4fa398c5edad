"""Which family a checkpoint belongs to, told from its files alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from siglane.config.layout.rule import ImageBudget
from siglane.errors import ConfigError
from siglane.families import nvila, siglip
from siglane.families.family import VlmFamily
from siglane.types import ImageLayout, Medium
from siglane.weights.hub import Checkpoint

VLM_FAMILIES: tuple[VlmFamily, ...] = (nvila.FAMILY,)


class Layouts(Protocol):
    """`ImageFacts.layouts` of one checkpoint."""

    def __call__(
        self, media: Sequence[Medium], budgets: Sequence[ImageBudget | None] | None = None
    ) -> tuple[ImageLayout, ...]: ...


def is_vision_only(checkpoint: Checkpoint) -> bool:
    """Whether this is a plain SigLIP checkpoint, without a language model."""
    return siglip.matches(checkpoint)


def layouts_of(checkpoint: Checkpoint) -> Layouts:
    """The layout rule of any known checkpoint, from its JSON files alone: no weights, no tokenizer."""
    if is_vision_only(checkpoint):
        return siglip.read_config(checkpoint).layouts
    return vlm_family(checkpoint).images(checkpoint).layouts


def vlm_family(checkpoint: Checkpoint) -> VlmFamily:
    """The family of a vision-language checkpoint. ConfigError says what was found and what is known."""
    for family in VLM_FAMILIES:
        if family.matches(checkpoint):
            return family
    if is_vision_only(checkpoint):
        raise ConfigError(
            f"{checkpoint.root} is a SigLIP tower without a language model; it can encode images, not answer"
        )
    raise unknown(checkpoint)


def unknown(checkpoint: Checkpoint) -> ConfigError:
    """The error for a checkpoint of no known family."""
    known = "; ".join(name for family in VLM_FAMILIES for name in family.known_as)
    known = f"siglane knows {known}; {'; '.join(siglip.MODEL_TYPES)}"
    if not checkpoint.has("config.json"):
        return ConfigError(f"{checkpoint.root} has no config.json; {known}")
    root = checkpoint.json("config.json")
    found = f"architectures {root.get('architectures')} and model_type {root.get('model_type')!r}"
    return ConfigError(f"{checkpoint.root} has {found}; {known}")
