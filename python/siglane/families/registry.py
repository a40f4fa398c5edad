"""Which family a checkpoint belongs to, told from its files alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from siglane.config.images import ImageFacts
from siglane.errors import ConfigError
from siglane.families.bee import Bee
from siglane.families.causal_lm import CausalLm
from siglane.families.family import Family, TowerFamily, VlmFamily
from siglane.families.idefics3 import Idefics3
from siglane.families.llava_onevision import LlavaOnevision
from siglane.families.llava_qwen import LlavaQwen
from siglane.families.nanovlm import NanoVlm
from siglane.families.nvila import Nvila
from siglane.families.ovis2_5 import Ovis2_5
from siglane.families.ovis2_6 import Ovis2_6
from siglane.families.r_4b import R4B
from siglane.families.siglip import Siglip
from siglane.families.siglip2 import Siglip2
from siglane.families.video_llama_3 import VideoLlama3
from siglane.families.videollama3_qwen2 import VideoLlama3Qwen2
from siglane.tiling.rule import no_images
from siglane.weights.hub import Checkpoint, without_config

F = TypeVar("F", bound=Family)

RELATIVES: tuple[VlmFamily, ...] = (R4B(), Bee(), LlavaQwen(), Ovis2_6())  # asked first: they state more
VLM_FAMILIES: tuple[VlmFamily, ...] = (
    *RELATIVES, Nvila(), LlavaOnevision(), Ovis2_5(), NanoVlm(), Idefics3(), VideoLlama3(), VideoLlama3Qwen2(),
)  # fmt: skip
CHAT_FAMILIES: tuple[VlmFamily, ...] = (*VLM_FAMILIES, CausalLm())
TOWER_FAMILIES: tuple[TowerFamily, ...] = (Siglip(), Siglip2())


def tower_family(checkpoint: Checkpoint) -> TowerFamily | None:
    """The family of a plain SigLIP checkpoint, without a language model; None for any other checkpoint."""
    return _first(TOWER_FAMILIES, checkpoint)


def is_vision_only(checkpoint: Checkpoint) -> bool:
    """Whether this is a plain SigLIP checkpoint, without a language model."""
    return tower_family(checkpoint) is not None


def is_vlm(checkpoint: Checkpoint) -> bool:
    """Whether this is a vision-language checkpoint of a known family."""
    return _first(VLM_FAMILIES, checkpoint) is not None


def image_facts(checkpoint: Checkpoint) -> ImageFacts:
    """The image facts of any known checkpoint, from its JSON files alone: no weights, no tokenizer. UserError
    `images_unsupported` for a language model without eyes."""
    facts = (tower_family(checkpoint) or vlm_family(checkpoint)).images(checkpoint)
    if facts is None:
        raise no_images()
    return facts


def vlm_family(checkpoint: Checkpoint) -> VlmFamily:
    """The family of a checkpoint that answers. ConfigError says what was found and what is known."""
    if family := _first(CHAT_FAMILIES, checkpoint):
        return family
    if is_vision_only(checkpoint):
        raise ConfigError(
            f"{checkpoint.root} is a SigLIP tower without a language model; it can encode images, not answer"
        )
    raise unknown(checkpoint)


def unknown(checkpoint: Checkpoint) -> ConfigError:
    """The error for a checkpoint of no known family."""
    families: tuple[Family, ...] = (*CHAT_FAMILIES, *TOWER_FAMILIES)
    known = "siglane knows " + "; ".join(name for family in families for name in family.known_as)
    if not checkpoint.has("config.json"):
        return ConfigError(f"{without_config(checkpoint.root)}; {known}")
    root = checkpoint.json("config.json")
    found = f"architectures {root.get('architectures')} and model_type {root.get('model_type')!r}"
    return ConfigError(f"{checkpoint.root} has {found}; {known}")


def _first(families: Sequence[F], checkpoint: Checkpoint) -> F | None:
    if not checkpoint.has("config.json"):
        return None
    root = checkpoint.json("config.json")
    return next((family for family in families if family.matches(root, checkpoint)), None)
