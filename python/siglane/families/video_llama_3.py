"""VideoLLaMA3 as transformers has it: a SigLIP with rotary positions alone, two layers and Qwen2 (formats.md 12).

Source: transformers 5.19 `models/video_llama_3`. The authors' own layout is `families/videollama3_qwen2.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from siglane.config.images import ImageFacts
from siglane.config.language import LanguageConfig
from siglane.config.preprocess import VIDEO_LLAMA_3, ImageProcessorConfig, PreprocessConfig, ProcessorClass
from siglane.config.projector import llava_projector
from siglane.config.reader import ConfigReader, RawConfig
from siglane.config.video import VideoRule
from siglane.config.vision import VisionConfig
from siglane.errors import ConfigError
from siglane.families.family import PromptRules, VlmFamily
from siglane.families.stated import media_token, required_image_processor, stated_classes, video_processor
from siglane.lm.qwen import qwen_plan
from siglane.nn.plan import WeightPlan
from siglane.projector.build import projector_plan
from siglane.tiling.bounds import Bounds
from siglane.tiling.video_llama_3 import NativeFrames
from siglane.types import Grid
from siglane.vision.tower import tower_plan
from siglane.weights.hub import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BLOCK = 28**2  # pixels of a merged row, by which transformers' defaults are written
FRAMES, FEWEST_FRAMES, FPS = 180, 4, 1.0  # the authors' example shows one a second; no file says otherwise

# of the authors' training code: a line for each picture or video, without a system's turn of its own
CHAT_TEMPLATE = (
    "{{% for message in messages %}}{{{{ '<|im_start|>' ~ message['role'] ~ '\n' }}}}"
    "{{% for part in message['content'] %}}"
    "{{{{ {{'image': '{image}\n', 'video': '{video}\n', 'text': part['text']}}[part['type']] }}}}"
    "{{% endfor %}}{{{{ '<|im_end|>\n' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"
)


class VideoLlama3(VlmFamily):
    """tower_key, tower_type: of config.json; decoder and the prefixes: what tensors' names start with."""

    name = "video_llama_3"
    known_as = ("VideoLlama3ForConditionalGeneration",)
    decoder: ClassVar[str] = "model.language_model."
    processor: ClassVar[ProcessorClass] = VIDEO_LLAMA_3
    tower_key, tower_type = "vision_config", "video_llama_3_vision"
    tower_prefix, projector_prefix = "model.vision_model.", "model.projector."

    def matches(self, root: RawConfig, checkpoint: Checkpoint) -> bool:
        return root.get("model_type") == self.name or self.known_as[0] in stated_classes(root)

    def images(self, checkpoint: Checkpoint) -> ImageFacts:
        section = checkpoint.reader().section(self.tower_key)
        section.choice("model_type", {self.tower_type: None}, self.tower_type)
        rope = section.section("rope_parameters") if section.has("rope_parameters") else ConfigReader({}, section.name)
        rope.choice("rope_type", {"axial": None}, "axial")
        vision = VisionConfig.from_hf(section.raw, feature_layer=-1, post_norm=True, head=False, name=section.name)
        vision = replace(vision, position_grid=Grid(0, 0), rope_theta=rope.value("rope_theta", float, 10000.0))
        width, names = self.language(checkpoint).hidden_size, ("readout.0", "readout.2")
        projector = llava_projector(input_size=vision.hidden_size, output_size=width, names=names)
        file = required_image_processor(checkpoint)
        if file.size("patch_size", 14) != vision.patch_size:
            raise ConfigError(f"{file.name}: patch_size {file.size('patch_size', 14)} is not the tower's")
        preprocess = PreprocessConfig.of(self.rule(checkpoint, file), self.pixels(file))
        video = self.video(checkpoint)
        return ImageFacts(vision=vision, projector=projector, preprocess=preprocess, newline=False, video=video)

    def pixels(self, file: ConfigReader) -> ImageProcessorConfig:
        if file.size("temporal_patch_size", 1) != 1:
            raise ConfigError(f"{file.name}: temporal_patch_size is not supported; every frame is seen by itself")
        return ImageProcessorConfig.from_hf(file.raw, self.processor, name=file.name)

    def rule(self, checkpoint: Checkpoint, file: ConfigReader) -> NativeFrames:
        frames = video_processor(checkpoint) or file
        if self.pixels(frames) != self.pixels(file):
            raise ConfigError(f"{frames.name}: normalisation of frames differs from that of pictures")
        picture, frame = _bounds(file, 1, 4 * BLOCK, 1280 * BLOCK), _bounds(frames, 2, 128 * BLOCK, 768 * BLOCK)
        drops_still = frames.value("use_token_compression", bool, True)
        return NativeFrames(picture=picture, frame=frame, resample=self.pixels(file).resample, drops_still=drops_still)

    def video(self, checkpoint: Checkpoint) -> VideoRule:
        file = video_processor(checkpoint) or required_image_processor(checkpoint)
        most = file.size("num_frames", file.size("max_frames", FRAMES))
        return VideoRule(
            media_token(checkpoint, "video_token", "<|video_pad|>"), most, max(most, FRAMES), spread="stepped",
            fps=file.value("fps", float, FPS), timed=True,
            fewest=file.size("num_frames", file.size("min_frames", FEWEST_FRAMES)),
        )  # fmt: skip

    def language(self, checkpoint: Checkpoint) -> LanguageConfig:
        root = checkpoint.reader()
        section = root.section("text_config")
        language = LanguageConfig.from_hf(section.raw, section.name)
        tied = language.tie_embeddings or root.value("tie_word_embeddings", bool, False)
        return replace(language, tie_embeddings=tied)

    def image_token(self, checkpoint: Checkpoint) -> str:
        return media_token(checkpoint, "image_token", "<|image_pad|>")

    def image_token_id(
        self, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerFast, language: LanguageConfig
    ) -> int:
        return checkpoint.reader().value("image_token_id", int, 151655)

    def prompt_rules(self, checkpoint: Checkpoint) -> PromptRules:
        image, video = self.image_token(checkpoint), self.video(checkpoint).token
        return PromptRules(default_template=CHAT_TEMPLATE.format(image=image, video=video), strip_messages=False)

    def has_processor(self, checkpoint: Checkpoint) -> bool:
        return True

    def vision_plan(self, images: ImageFacts) -> WeightPlan:
        tower = tower_plan(images.vision).under(self.tower_prefix, "encoder.tower.")
        return tower + projector_plan(images.projector).under(self.projector_prefix, "projector.")

    def language_plan(self, language: LanguageConfig) -> WeightPlan:
        return qwen_plan(language, decoder=self.decoder)


def _bounds(file: ConfigReader, merge: int, least: int, most: int) -> Bounds:
    """merge: patches along a row of the prompt; least, most: pixels; each where the file does not say. Older files have
    `min_pixels` and `max_pixels`, which win."""
    older = {"shortest_edge": file.raw.get("min_pixels"), "longest_edge": file.raw.get("max_pixels")}
    stated = file.section("size").raw if file.has("size") else {"shortest_edge": least, "longest_edge": most}
    size = ConfigReader({**stated, **{key: value for key, value in older.items() if value is not None}}, file.name)
    factor = file.size("patch_size", 14) * file.size("merge_size", merge)
    return Bounds(factor, size.size("shortest_edge"), size.size("longest_edge"))
