"""Language models without eyes: Qwen2, Qwen3, Qwen3-MoE and Llama in transformers' layout (formats.md section 8)."""

from __future__ import annotations

from collections.abc import Callable

from siglane.config.images import ImageFacts
from siglane.config.language import LanguageConfig
from siglane.config.reader import RawConfig
from siglane.families.family import PromptRules, VlmFamily
from siglane.families.files import THINK_END
from siglane.families.stated import stated_classes
from siglane.nn.plan import WeightPlan
from siglane.weights.hub import Checkpoint, Source

READERS: dict[str, Callable[[RawConfig, str], LanguageConfig]] = {
    "Qwen2ForCausalLM": LanguageConfig.from_hf,
    "Qwen3ForCausalLM": LanguageConfig.from_hf,
    "Qwen3MoeForCausalLM": LanguageConfig.from_hf,
    "LlamaForCausalLM": LanguageConfig.from_llama,
}
MODEL_TYPES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama": "LlamaForCausalLM",
}
THINKING = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")


def model_class(root: RawConfig) -> str | None:
    """Which of `READERS` a config.json states; by `model_type`, as transformers, where it names no class. A class of
    another use (a reward model, an encoder) is none of them."""
    if classes := stated_classes(root):
        return next((name for name in classes if name in READERS), None)
    return MODEL_TYPES.get(str(root.get("model_type")))


class CausalLm(VlmFamily):
    name = "causal_lm"
    known_as = tuple(READERS)
    eos_ends = thinks = True

    def matches(self, root: RawConfig, checkpoint: Checkpoint) -> bool:
        return model_class(root) is not None

    def images(self, checkpoint: Checkpoint) -> None:
        return None

    def language(self, checkpoint: Checkpoint) -> LanguageConfig:
        root = checkpoint.json("config.json")
        return READERS[str(model_class(root))](root, "config.json")

    def prompt_rules(self, checkpoint: Checkpoint) -> PromptRules:
        """The template is the tokenizer's: without one nobody knows how this model is spoken to."""
        thinks = model_class(checkpoint.json("config.json")) in THINKING
        return PromptRules(default_template="", strip_messages=False, thinking_end=THINK_END if thinks else "")

    def vision_plan(self, images: ImageFacts) -> WeightPlan:
        return WeightPlan(())

    def vision_sources(self, checkpoint: Checkpoint) -> tuple[Source, ...]:
        return ()
