"""Ovis2.5: a native-resolution tower, a visual vocabulary and Qwen3, all in one folder (formats.md section 3).

Sources: AIDC-AI/Ovis (ovis/model, ovis/model/vit), vLLM 0.32 models/ovis2_5.py and siglip2navit.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from siglane.config.language import LanguageConfig
from siglane.config.preprocess import ImageProcessorConfig, PreprocessConfig
from siglane.config.projector import vocabulary_projector
from siglane.config.reader import ConfigReader
from siglane.config.video import VideoRule
from siglane.config.vision import VisionConfig
from siglane.config.vlm import ImageFacts, Thinking, VlmConfig
from siglane.errors import ConfigError
from siglane.families.family import PromptRules, VlmFamily
from siglane.families.tokens import end_of_answer
from siglane.tiling.navit import NativeResolution
from siglane.weights.hub import Checkpoint, Source
from siglane.weights.plan import WeightPlan, projector_plan, qwen_plan, tower_plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ARCHITECTURE = "Ovis2_5"
MODEL_TYPES = ("ovis", "ovis2_5")
IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"
END_OF_TURN = "<|im_end|>"
THINK_START, THINK_END = "<think>", "</think>"
LANGUAGE, TOWER = "llm.", "visual_tokenizer.vit."
PREPROCESSOR = "preprocessor_config.json"

# arguments of the reference's `chat`; no file of a released checkpoint states them
MIN_PIXELS, MAX_PIXELS = 448**2, 1792**2
BILINEAR = 2

INDICATORS = 4  # last rows of the visual vocabulary: start and end of an image, start and end of a video

FRAMES, MOST_FRAMES = 8, 128  # the reference's demo shows 8; beyond 128 no context would hold them

# what the reference makes a model say whose thinking budget is spent
FORCED_END = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
    "</think>\n\n"
)

# No default system turn; the text behind `</think>` is all that is kept of earlier answers (`PromptRules`). The hub's
# template also takes the letters `<image>` and `<video>` out of messages, lest they become placeholders; siglane's
# prompts cannot be written that way (families/prompt/reserved.py), so a user's text stays as it is.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' ~ message['role'] ~ '\n' ~ message['content'] ~ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)


def matches(checkpoint: Checkpoint) -> bool:
    if not checkpoint.has("config.json"):
        return False
    root = checkpoint.json("config.json")
    named = ARCHITECTURE in (root.get("architectures") or [])
    return named or (root.get("model_type") in MODEL_TYPES and "vit_config" in root)


def read_images(checkpoint: Checkpoint) -> ImageFacts:
    """The image facts. ConfigError names the key that is missing, unknown or contradictory."""
    root = ConfigReader(checkpoint.json("config.json"), "config.json")
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
        output_size=_language(root).hidden_size,
    )
    raw = checkpoint.json(PREPROCESSOR) if checkpoint.has(PREPROCESSOR) else {}
    # every picture has its own size, the file's is not used
    processor = ImageProcessorConfig.from_hf(
        {key: value for key, value in raw.items() if key != "size"}, resample=BILINEAR, name=PREPROCESSOR
    )
    bounds = ConfigReader(raw, PREPROCESSOR)
    rule = NativeResolution(
        factor=vision.patch_size * stride,
        min_pixels=bounds.size("min_pixels", MIN_PIXELS),
        max_pixels=bounds.size("max_pixels", MAX_PIXELS),
        resample=processor.resample,
    )
    return ImageFacts(vision=vision, projector=projector, preprocess=PreprocessConfig.of(rule, processor))


def read_config(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerFast) -> VlmConfig:
    """All facts. ConfigError as `read_images`, and for a conversation format that is not known."""
    images = read_images(checkpoint)
    root = ConfigReader(checkpoint.json("config.json"), "config.json")
    root.choice("conversation_formatter_class", {"Qwen3ConversationFormatter": None}, "Qwen3ConversationFormatter")
    language = _language(root)
    return VlmConfig(
        family=FAMILY.name,
        vision=images.vision,
        projector=images.projector,
        preprocess=images.preprocess,
        language=language,
        image_token=IMAGE_TOKEN,
        # the reference's is negative; outside the table it is neither looked up nor ever an answer
        image_token_id=max(language.vocab_size, len(tokenizer)),
        eos_token_ids=end_of_answer(checkpoint, tokenizer, END_OF_TURN),
        image_newline=False,
        video=VideoRule(VIDEO_TOKEN, FRAMES, MOST_FRAMES, spread="centred", with_images=False),
        thinking=_thinking(tokenizer),
    )


def _language(root: ConfigReader) -> LanguageConfig:
    section = root.section("llm_config")
    language = LanguageConfig.from_hf(section.raw, section.name)
    if root.has("hidden_size") and root.size("hidden_size") != language.hidden_size:
        raise ConfigError(
            f"config.json: hidden_size {root.size('hidden_size')} is not llm_config's {language.hidden_size}"
        )
    return language


def _thinking(tokenizer: PreTrainedTokenizerFast) -> Thinking | None:
    vocabulary = tokenizer.get_vocab()
    if THINK_START not in vocabulary or THINK_END not in vocabulary:
        return None
    forced = tokenizer(FORCED_END, add_special_tokens=False).input_ids
    return Thinking(vocabulary[THINK_START], vocabulary[THINK_END], tuple(forced))


def _vision_plan(config: VlmConfig) -> WeightPlan:
    return tower_plan(config.vision).under(TOWER, "tower.") + projector_plan(config.projector).under("", "projector.")


_PROMPT_RULES = PromptRules(default_template=CHAT_TEMPLATE, strip_messages=False, joint="\n", thinking_end=THINK_END)

FAMILY = VlmFamily(
    name="ovis2_5",
    known_as=(ARCHITECTURE,),
    matches=matches,
    tokenizer_folder=lambda checkpoint: checkpoint,
    images=read_images,
    config=read_config,
    prompt_rules=lambda checkpoint: _PROMPT_RULES,
    vision_plan=_vision_plan,
    language_plan=lambda config: qwen_plan(config.language).under(LANGUAGE, ""),
    vision_sources=lambda checkpoint: (Source(checkpoint),),
    language_sources=lambda checkpoint: (Source(checkpoint),),
    language_prefix=LANGUAGE,
)
