"""LLaVA-OneVision in transformers' layout: a SigLIP tower, two linear layers and Qwen2, pictures by anyres.

Sources: transformers 5.19 `models/llava_onevision` and its conversion script; formats.md section 6.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from siglane.config.language import LanguageConfig
from siglane.config.preprocess import ImageProcessorConfig, PreprocessConfig
from siglane.config.projector import llava_projector
from siglane.config.reader import ConfigReader
from siglane.config.video import VideoRule
from siglane.config.vision import ACTIVATIONS, VisionConfig
from siglane.config.vlm import ImageFacts, VlmConfig
from siglane.errors import ConfigError
from siglane.families.family import PromptRules, VlmFamily
from siglane.tiling.anyres import AnyResTiling, Pinpoint
from siglane.weights.hub import Checkpoint, Source
from siglane.weights.plan import Ignore, Rule, WeightPlan, projector_plan, qwen_plan, tower_plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MODEL_TYPE = "llava_onevision"
TOWER_TYPE = "siglip_vision_model"
PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"
IMAGE_TOKEN, VIDEO_TOKEN, END_OF_TURN = "<image>", "<video>", "<|im_end|>"

# `LlavaOnevisionImageProcessor`'s values for keys that its file lacks
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PINPOINTS: tuple[Pinpoint, ...] = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))

# the paper's 32 frames, and as many as fit Qwen2's 32768 positions with room for an answer
FRAMES, MOST_FRAMES = 32, 128

# what the conversion script gives: all images of a message, then its videos, then its texts; no default system turn
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' ~ message['role'] ~ '\n' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'video' %}{{ '<video>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def matches(checkpoint: Checkpoint) -> bool:
    return checkpoint.has("config.json") and checkpoint.json("config.json").get("model_type") == MODEL_TYPE


def read_images(checkpoint: Checkpoint) -> ImageFacts:
    """The image facts. ConfigError names the key that is missing, unknown or contradictory."""
    root = ConfigReader(checkpoint.json("config.json"), "config.json")
    tower = root.section("vision_config")
    tower.choice("model_type", {TOWER_TYPE: None}, TOWER_TYPE)
    if root.value("vision_feature_select_strategy", str, "full") != "full":
        raise ConfigError(
            f"config.json: vision_feature_select_strategy {root.raw['vision_feature_select_strategy']!r} drops the "
            "first patch, which SigLIP needs; siglane knows 'full'"
        )
    layer = root.value("vision_feature_layer", int, -1)
    vision = VisionConfig.from_hf(tower.raw, feature_layer=layer, post_norm=False, name=tower.name)
    return ImageFacts(
        vision=replace(vision, use_head=False),
        projector=llava_projector(
            input_size=vision.hidden_size,
            output_size=_language(root).hidden_size,
            activation=root.choice("projector_hidden_act", ACTIVATIONS, "gelu"),
            bias=root.value("multimodal_projector_bias", bool, True),
        ),
        preprocess=_preprocess(checkpoint, root, tower.size("image_size", 224)),
    )


def read_config(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerFast) -> VlmConfig:
    """All facts."""
    images = read_images(checkpoint)
    root = ConfigReader(checkpoint.json("config.json"), "config.json")
    return VlmConfig(
        family=FAMILY.name,
        vision=images.vision,
        projector=images.projector,
        preprocess=images.preprocess,
        language=_language(root),
        image_token=IMAGE_TOKEN,
        image_token_id=root.value("image_token_index", int, root.value("image_token_id", int, 151646)),
        eos_token_ids=_eos_token_ids(checkpoint, tokenizer),
        image_newline=True,
        video=VideoRule(VIDEO_TOKEN, frames=FRAMES, most_frames=MOST_FRAMES, spread="floored"),
        thinking=None,
    )


def _language(root: ConfigReader) -> LanguageConfig:
    section = root.section("text_config")
    language = LanguageConfig.from_hf({"model_type": "qwen2", **section.raw}, section.name)
    tied = language.tie_embeddings or root.value("tie_word_embeddings", bool, False)
    return replace(language, tie_embeddings=tied)


def _preprocess(checkpoint: Checkpoint, root: ConfigReader, side: int) -> PreprocessConfig:
    """side: pixels of the pictures that the tower takes."""
    file = _stated(checkpoint, "image_processor", PREPROCESSOR)
    if file is None:
        raise ConfigError(f"{checkpoint.root} has no {PREPROCESSOR}, which says how pictures are normalised")
    video_file = _stated(checkpoint, "video_processor", f"video_{PREPROCESSOR}") or file
    pictures, frames = _processor(file), _processor(video_file)
    if pictures.size != (side, side):
        width, height = pictures.size
        raise ConfigError(f"{file.name}: {width}x{height} pixels do not fit the tower, which takes {side}x{side}")
    if replace(frames, resample=pictures.resample) != pictures:
        raise ConfigError(f"{video_file.name}: size and normalisation of frames differ from those of pictures")
    pinpoints = _pinpoints(root)
    if _pinpoints(file) != pinpoints:
        raise ConfigError(f"image_grid_pinpoints of config.json and {file.name} differ")
    red, green, blue = (int(channel * 255) for channel in pictures.mean)
    rule = AnyResTiling(
        tile=pictures.size,
        resample=pictures.resample,
        frame_resample=frames.resample,
        fill=(red, green, blue),
        pinpoints=pinpoints,
        max_maps=_max_maps(root),
    )
    return PreprocessConfig.of(rule, pictures)


def _stated(checkpoint: Checkpoint, section: str, file: str) -> ConfigReader | None:
    """A section of processor_config.json (transformers 5), else `file` (before), as transformers chooses."""
    if checkpoint.has(PROCESSOR):
        whole = ConfigReader(checkpoint.json(PROCESSOR), PROCESSOR)
        if whole.has(section):
            return whole.section(section)
    return ConfigReader(checkpoint.json(file), file) if checkpoint.has(file) else None


def _processor(file: ConfigReader) -> ImageProcessorConfig:
    if file.value("do_center_crop", bool, False):
        raise ConfigError(f"{file.name}: do_center_crop true is not supported; tiles are whole")
    return ImageProcessorConfig.from_hf(file.raw, mean=CLIP_MEAN, std=CLIP_STD, size=384, name=file.name)


def _pinpoints(reader: ConfigReader) -> tuple[Pinpoint, ...]:
    if not reader.has("image_grid_pinpoints"):
        return PINPOINTS
    found = reader.raw["image_grid_pinpoints"]
    if not isinstance(found, list) or not all(_is_pair(pair) for pair in found):
        raise ConfigError(f"{reader.name}: image_grid_pinpoints must be a list of [height, width], got {found!r}")
    return tuple((height, width) for height, width in found)


def _is_pair(found: Any) -> bool:
    return isinstance(found, list) and len(found) == 2 and all(type(side) is int for side in found)


def _max_maps(root: ConfigReader) -> int:
    ratio = root.value("vision_aspect_ratio", str, "anyres_max_9")
    most = re.fullmatch(r"anyres_max_([1-9]\d{0,3})", ratio)
    if most is None:
        raise ConfigError(f"config.json: vision_aspect_ratio {ratio!r} is not known; siglane knows anyres_max_<N>")
    return int(most[1])


def _eos_token_ids(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """generation_config.json's and the end of a turn."""
    found: list[Any] = []
    if checkpoint.has("generation_config.json"):
        stated = checkpoint.json("generation_config.json").get("eos_token_id")
        found += stated if isinstance(stated, list) else [] if stated is None else [stated]
    vocabulary = tokenizer.get_vocab()
    found += [vocabulary[END_OF_TURN]] if END_OF_TURN in vocabulary else []
    if not found or not all(type(token) is int and token >= 0 for token in found):
        raise ConfigError(f"{checkpoint.root}: generation_config.json and the tokenizer have no usable end of answer")
    return tuple(dict.fromkeys(found))


def _vision_plan(config: VlmConfig) -> WeightPlan:
    """A tensor's name may start with `model.`, as transformers has it in memory."""
    tower = tower_plan(config.vision).under("vision_tower.", "encoder.tower.")
    projector = projector_plan(config.projector).under("multi_modal_projector.", "projector.")
    newline = WeightPlan((Rule("image_newline", "newline"),))
    return (tower + projector + newline).under("[model.]", "")


def _language_plan(config: VlmConfig) -> WeightPlan:
    """`language_model.model.`, `language_model.lm_head.` on disk; `model.language_model.`, `lm_head.` in memory."""
    plan = qwen_plan(config.language)
    in_memory = (
        replace(entry, pattern=entry.pattern.replace("model.", "model.language_model.", 1))
        for entry in plan.entries
        if isinstance(entry, Rule | Ignore)
    )
    return plan.under("language_model.", "") + WeightPlan(tuple(in_memory))


FAMILY = VlmFamily(
    name=MODEL_TYPE,
    known_as=("LlavaOnevisionForConditionalGeneration",),
    matches=matches,
    tokenizer_folder=lambda checkpoint: checkpoint,
    images=read_images,
    config=read_config,
    prompt_rules=lambda checkpoint: PromptRules(default_template=CHAT_TEMPLATE, strip_messages=False),
    vision_plan=_vision_plan,
    language_plan=_language_plan,
    vision_sources=lambda checkpoint: (Source(checkpoint),),
    language_sources=lambda checkpoint: (Source(checkpoint),),
    language_prefix="language_model.",
)
