"""Which family a checkpoint belongs to, told from its files alone."""

from __future__ import annotations

from siglane.config.vlm import ImageFacts
from siglane.errors import ConfigError
from siglane.families import llava_onevision, nanovlm, nvila, ovis2_5, siglip, siglip2
from siglane.families.family import TowerFamily, VlmFamily
from siglane.weights.hub import Checkpoint

VLM_FAMILIES: tuple[VlmFamily, ...] = (nvila.FAMILY, llava_onevision.FAMILY, ovis2_5.FAMILY, nanovlm.FAMILY)

TOWER_FAMILIES: tuple[TowerFamily, ...] = (siglip.FAMILY, siglip2.FAMILY)


def tower_family(checkpoint: Checkpoint) -> TowerFamily | None:
    """The family of a plain SigLIP checkpoint, without a language model; None for any other checkpoint."""
    return next((family for family in TOWER_FAMILIES if family.matches(checkpoint)), None)


def is_vision_only(checkpoint: Checkpoint) -> bool:
    """Whether this is a plain SigLIP checkpoint, without a language model."""
    return tower_family(checkpoint) is not None


def is_vlm(checkpoint: Checkpoint) -> bool:
    """Whether this is a vision-language checkpoint of a known family."""
    return any(family.matches(checkpoint) for family in VLM_FAMILIES)


def image_facts(checkpoint: Checkpoint) -> ImageFacts:
    """The image facts of any known checkpoint, from its JSON files alone: no weights, no tokenizer."""
    if tower := tower_family(checkpoint):
        return tower.read_config(checkpoint)
    return vlm_family(checkpoint).images(checkpoint)


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
    families: tuple[VlmFamily | TowerFamily, ...] = (*VLM_FAMILIES, *TOWER_FAMILIES)
    known = "siglane knows " + "; ".join(name for family in families for name in family.known_as)
    if not checkpoint.has("config.json"):
        return ConfigError(f"{checkpoint.root} has no config.json; {known}")
    root = checkpoint.json("config.json")
    found = f"architectures {root.get('architectures')} and model_type {root.get('model_type')!r}"
    return ConfigError(f"{checkpoint.root} has {found}; {known}")
