"""LLaVA-OneVision in transformers' layout: a SigLIP tower, two linear layers and Qwen2 or Qwen3, pictures by anyres.

Sources: transformers 5.19 `models/llava_onevision` and its conversion script; formats.md section 6. VARCO-VISION-2.0 is
this model with Qwen3; relatives with code of their own derive from it (`families/r_4b.py`, `families/bee.py`).
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import Any, ClassVar

from siglane.config.images import ImageFacts
from siglane.config.language import LanguageConfig
from siglane.config.preprocess import LLAVA_ONEVISION, ImageProcessorConfig, PreprocessConfig
from siglane.config.projector import llava_projector
from siglane.config.reader import ConfigReader, RawConfig
from siglane.config.video import VideoRule
from siglane.config.vision import ACTIVATIONS
from siglane.errors import ConfigError
from siglane.families.composite import CompositeFamily
from siglane.families.family import PromptRules, chatml
from siglane.families.files import llava_tower
from siglane.families.stated import media_token, required_image_processor, video_processor, video_processors
from siglane.lm.qwen import qwen_plan
from siglane.nn.plan import Rule, WeightPlan
from siglane.tiling.anyres import AnyResTiling, Pinpoint
from siglane.weights.hub import Checkpoint

logger = logging.getLogger(__name__)

VIDEO_TOKEN = "<video>"

# `LlavaOnevisionImageProcessor`'s where its file states none
PINPOINTS: tuple[Pinpoint, ...] = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))

# the paper's 32 frames, and as many as fit Qwen2's 32768 positions with room for an answer
FRAMES, MOST_FRAMES = 32, 128

# what the conversion script gives: all images of a message, then its videos, then its texts; no default system turn
CHAT_TEMPLATE = chatml(
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'video' %}{{ '<video>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
)


class LlavaOnevision(CompositeFamily):
    """reads_videos: whether its processor does; pre_norm, widening: of the projector, the eps of a norm in front of it,
    and the width between its layers as a multiple of the language model's."""

    name = "llava_onevision"
    known_as = ("LlavaOnevisionForConditionalGeneration",)
    tower_prefix, projector_prefix = "[model.]vision_tower.", "[model.]multi_modal_projector."
    language_prefix = "language_model."
    thinks = True
    text_defaults: ClassVar[RawConfig] = {"model_type": "qwen2"}
    image_token_default: ClassVar[int | None] = 151646
    reads_videos: ClassVar[bool] = True
    pre_norm: ClassVar[float | None] = None
    widening: ClassVar[int] = 1

    def images(self, checkpoint: Checkpoint) -> ImageFacts:
        root = checkpoint.reader()
        if root.value("vision_feature_select_strategy", str, "full") != "full":
            raise ConfigError(
                f"config.json: vision_feature_select_strategy {root.raw['vision_feature_select_strategy']!r} drops the "
                "first patch, which SigLIP needs; siglane knows 'full'"
            )
        tower = root.section("vision_config")
        vision = llava_tower(tower, root.value("vision_feature_layer", int, -1))
        preprocess, video = _preprocess(checkpoint, root, tower.size("image_size", 224))
        width = self.language(checkpoint).hidden_size
        return ImageFacts(
            vision=vision,
            projector=llava_projector(
                input_size=vision.hidden_size,
                output_size=width,
                activation=root.choice("projector_hidden_act", ACTIVATIONS, "gelu"),
                bias=root.value("multimodal_projector_bias", bool, True),
                middle_size=width * self.widening,
                pre_norm=self.pre_norm,
            ),
            preprocess=preprocess,
            newline=True,
            video=video if self.reads_videos else None,
        )

    def prompt_rules(self, checkpoint: Checkpoint) -> PromptRules:
        return PromptRules(default_template=CHAT_TEMPLATE, strip_messages=False)

    def vision_plan(self, images: ImageFacts) -> WeightPlan:
        """A tensor's name may start with `model.`, as transformers has it in memory."""
        return super().vision_plan(images) + WeightPlan((Rule("[model.]image_newline", "newline"),))

    def language_plan(self, language: LanguageConfig) -> WeightPlan:
        """`language_model.` in front of Qwen's names on disk; `model.language_model.` and `lm_head.` in memory."""
        return super().language_plan(language) + qwen_plan(language, decoder="model.language_model.")


def _preprocess(checkpoint: Checkpoint, root: ConfigReader, side: int) -> tuple[PreprocessConfig, VideoRule | None]:
    """side: pixels of the pictures that the tower takes."""
    file = required_image_processor(checkpoint)
    video_file = video_processor(checkpoint) or file
    pictures, frames = _processor(file), _processor(video_file)
    if pictures.size != (side, side):
        width, height = pictures.size
        raise ConfigError(f"{file.name}: {width}x{height} pixels do not fit the tower, which takes {side}x{side}")
    alike = replace(frames, resample=pictures.resample) == pictures
    if not alike and video_processors(checkpoint):
        raise ConfigError(f"{video_file.name}: size and normalisation of frames differ from those of pictures")
    if not alike:
        logger.warning(
            "%s: %s gives videos another size or normalisation than %s gives pictures; videos are refused",
            checkpoint.root, video_file.name, file.name,
        )  # fmt: skip
    pinpoints = _pinpoints(root)
    if _pinpoints(file) != pinpoints:
        raise ConfigError(f"image_grid_pinpoints of config.json and {file.name} differ")
    rule = AnyResTiling(
        tile=pictures.size,
        resample=pictures.resample,
        frame_resample=frames.resample,
        fill=pictures.fill,
        pinpoints=pinpoints,
        max_maps=max_maps(root, "vision_aspect_ratio"),
    )
    return PreprocessConfig.of(rule, pictures), _video(checkpoint, video_file) if alike else None


def _processor(file: ConfigReader) -> ImageProcessorConfig:
    return ImageProcessorConfig.from_hf(file.raw, LLAVA_ONEVISION, name=file.name)


def _video(checkpoint: Checkpoint, file: ConfigReader) -> VideoRule:
    """ConfigError for frames that are chosen by time."""
    if file.value("do_sample_frames", bool, False) and file.value("fps", float, 0.0) > 0:
        raise ConfigError(f"{file.name}: fps {file.raw['fps']} is not supported; siglane knows num_frames")
    frames = file.size("num_frames", FRAMES)
    token = media_token(checkpoint, "video_token", VIDEO_TOKEN)
    return VideoRule(token, frames=frames, most_frames=max(frames, MOST_FRAMES), spread="floored")


def _pinpoints(reader: ConfigReader) -> tuple[Pinpoint, ...]:
    if not reader.has("image_grid_pinpoints"):
        return PINPOINTS
    found = reader.raw["image_grid_pinpoints"]
    if not isinstance(found, list) or not all(_is_pair(pair) for pair in found):
        raise ConfigError(f"{reader.name}: image_grid_pinpoints must be a list of [height, width], got {found!r}")
    return tuple((height, width) for height, width in found)


def _is_pair(found: Any) -> bool:
    return isinstance(found, list) and len(found) == 2 and all(type(side) is int for side in found)


def max_maps(root: ConfigReader, key: str, others: str = "") -> int:
    """N of `anyres_max_<N>`. others: what else is known, for messages."""
    ratio = root.value(key, str, "anyres_max_9")
    most = re.fullmatch(r"anyres_max_([1-9]\d{0,3})", ratio)
    if most is None:
        raise ConfigError(f"{root.name}: {key} {ratio!r} is not known; siglane knows anyres_max_<N>{others}")
    return int(most[1])
