"""Ovis2.5: a native-resolution tower, a visual vocabulary and Qwen3, all in one folder (formats.md section 3).

Sources: AIDC-AI/Ovis (ovis/model, ovis/model/vit), vLLM 0.32 models/ovis2_5.py and siglip2navit.py.
"""

from __future__ import annotations

from typing import ClassVar

from siglane.config.images import ImageFacts
from siglane.config.language import LanguageConfig
from siglane.config.preprocess import OVIS, ImageProcessorConfig, PreprocessConfig
from siglane.config.projector import vocabulary_projector
from siglane.config.reader import ConfigReader, RawConfig
from siglane.config.video import VideoRule
from siglane.config.vision import VisionConfig
from siglane.families.family import CHATML, PromptRules, VlmFamily
from siglane.families.files import THINK_END
from siglane.families.stated import PREPROCESSOR, image_processor, stated_classes
from siglane.tiling.navit import NativeResolution
from siglane.weights.hub import Checkpoint

ARCHITECTURE = "Ovis2_5"
MODEL_TYPES = ("ovis", "ovis2_5")
VIDEO_TOKEN = "<video>"

# arguments of the reference's `chat`; no file of a released checkpoint states them
MIN_PIXELS, MAX_PIXELS = 448**2, 1792**2

INDICATORS = 4  # last rows of the visual vocabulary: start and end of an image, start and end of a video

FRAMES, MOST_FRAMES = 8, 128  # the reference's demo shows 8; beyond 128 no context would hold them

# No default system turn; the text behind `</think>` is all that is kept of earlier answers (`PromptRules`). The hub's
# template also takes the letters `<image>` and `<video>` out of messages, lest they become placeholders; siglane's
# prompts cannot be written that way (families/prompt/reserved.py), so a user's text stays as it is.
CHAT_TEMPLATE = CHATML + (
    "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}"
)


class Ovis2_5(VlmFamily):
    """max_pixels: of a picture, where no file states it; None: a file has to."""

    name = "ovis2_5"
    known_as: ClassVar[tuple[str, ...]] = (ARCHITECTURE,)
    tower_prefix, language_prefix = "visual_tokenizer.vit.", "llm."
    thinks = True
    max_pixels: ClassVar[int | None] = MAX_PIXELS

    def matches(self, root: RawConfig, checkpoint: Checkpoint) -> bool:
        named = ARCHITECTURE in stated_classes(root)
        return named or (root.get("model_type") in MODEL_TYPES and "vit_config" in root)

    def images(self, checkpoint: Checkpoint) -> ImageFacts:
        root = checkpoint.reader()
        tower = root.section("vit_config")
        vision = VisionConfig.from_navit(tower.raw, tower.name)
        stride = tower.size("hidden_stride", 2)
        projector = vocabulary_projector(
            stride,
            root.size("visual_vocab_size"),
            INDICATORS,
            head="visual_tokenizer.head",
            table="vte",
            input_size=vision.hidden_size,
            output_size=self.language(checkpoint).hidden_size,
        )
        bounds = image_processor(checkpoint) or ConfigReader({}, PREPROCESSOR)
        processor = ImageProcessorConfig.from_hf(bounds.raw, OVIS, name=bounds.name)
        rule = NativeResolution(
            factor=vision.patch_size * stride,
            min_pixels=bounds.size("min_pixels", MIN_PIXELS),
            max_pixels=bounds.size("max_pixels", self.max_pixels),
            resample=processor.resample,
        )
        return ImageFacts(
            vision=vision,
            projector=projector,
            preprocess=PreprocessConfig.of(rule, processor),
            newline=False,
            video=VideoRule(VIDEO_TOKEN, FRAMES, MOST_FRAMES, spread="centred", with_images=False),
        )

    def language(self, checkpoint: Checkpoint) -> LanguageConfig:
        """Its section is called `text_config` where vLLM or transformers wrote it."""
        root = checkpoint.reader()
        named = "text_config" if root.has("text_config") else "llm_config"
        section = root.section(named)
        language = LanguageConfig.from_hf(section.raw, section.name)
        root.agree("hidden_size", language.hidden_size, f"{named}'s")
        return language

    def prompt_rules(self, checkpoint: Checkpoint) -> PromptRules:
        """ConfigError for a conversation format that is not known."""
        checkpoint.reader().only("conversation_formatter_class", "Qwen3ConversationFormatter")
        return PromptRules(default_template=CHAT_TEMPLATE, strip_messages=False, joint="\n", thinking_end=THINK_END)
