"""Idefics3, SmolVLM, SmolVLM2, SmolDocling and granite-docling: a SigLIP tower, pixel shuffle, one layer and a Llama.

Source: transformers 5.19 `models/idefics3` and `models/smolvlm`, which differ in videos and names alone; formats.md 11.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from siglane.config.images import ImageFacts
from siglane.config.language import LanguageConfig
from siglane.config.preprocess import IDEFICS3, ImageProcessorConfig, PreprocessConfig, longest_edge
from siglane.config.projector import pixel_shuffle_projector
from siglane.config.reader import ConfigReader, RawConfig
from siglane.config.video import VideoRule
from siglane.config.vision import IDEFICS3_SIZES, VisionConfig
from siglane.errors import ConfigError
from siglane.families.family import PromptRules, VlmFamily
from siglane.families.files import check_rows
from siglane.families.stated import PROCESSOR, media_token, required_image_processor, video_processor
from siglane.lm.qwen import qwen_plan
from siglane.nn.plan import WeightPlan
from siglane.projector.build import projector_plan
from siglane.tiling.idefics3 import LongestEdge
from siglane.types import Size
from siglane.vision.tower import tower_plan
from siglane.weights.hub import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SIDE, FRAMES, FPS = 364, 64, 1.0  # pixels of a tile, of which a picture is four long; of a video; where no file says so

# `SmolVLMProcessor` takes its own for every request with a video: those of checkpoints have no place for one
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}{% for part in message['content'] %}"
    "{{ {'image': '<image>', 'video': '<video>', 'text': part['text']}[part['type']] }}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


class Idefics3(VlmFamily):
    name = "idefics3"
    known_as = ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration")
    tied_at_root = True

    def matches(self, root: RawConfig, checkpoint: Checkpoint) -> bool:
        return root.get("model_type") in ("idefics3", "smolvlm")

    def images(self, checkpoint: Checkpoint) -> ImageFacts:
        root = checkpoint.reader()
        tower, factor = root.section("vision_config"), root.size("scale_factor", 2)
        vision = VisionConfig.from_hf(
            tower.raw, feature_layer=-1, post_norm=True, head=False, defaults=IDEFICS3_SIZES,
            position_resize="bucketised", name=tower.name,
        )  # fmt: skip
        preprocess, tile, video = _pictures(checkpoint, videos=root.raw["model_type"] == "smolvlm")
        counts = ConfigReader(checkpoint.optional(PROCESSOR), PROCESSOR)
        check_rows(tile // vision.patch_size, factor, "config.json: scale_factor", counts, "image_seq_len")
        width, name = self.language(checkpoint).hidden_size, "modality_projection.proj"
        projector = pixel_shuffle_projector(factor, input_size=vision.hidden_size, output_size=width, name=name)
        return ImageFacts(vision=vision, projector=projector, preprocess=preprocess, newline=False, video=video)

    def language(self, checkpoint: Checkpoint) -> LanguageConfig:
        """What text_config says of a tied head counts for nothing."""
        root = checkpoint.reader()
        section = root.section("text_config")
        section.choice("model_type", {"llama": None}, "llama")
        language = LanguageConfig.from_llama(section.raw, section.name)
        return replace(language, tie_embeddings=root.value("tie_word_embeddings", bool, False))

    def image_token(self, checkpoint: Checkpoint) -> str:
        return media_token(checkpoint, "image_token", super().image_token(checkpoint))

    def image_token_id(
        self, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerFast, language: LanguageConfig
    ) -> int:
        return checkpoint.reader().value("image_token_id", int, 128257)

    def ends(self, tokenizer: PreTrainedTokenizerFast) -> Sequence[str | None]:
        return (tokenizer.eos_token,)

    def prompt_rules(self, checkpoint: Checkpoint) -> PromptRules:
        return PromptRules(default_template=CHAT_TEMPLATE, strip_messages=False, video_template=CHAT_TEMPLATE)

    def has_processor(self, checkpoint: Checkpoint) -> bool:
        return True

    def vision_plan(self, images: ImageFacts) -> WeightPlan:
        tower = tower_plan(images.vision).under("vision_model.", "encoder.tower.")
        return (tower + projector_plan(images.projector).under("connector.", "projector.")).under("[model.]", "")

    def language_plan(self, language: LanguageConfig) -> WeightPlan:
        return qwen_plan(language, decoder="[model.]text_model.")


def _pictures(checkpoint: Checkpoint, *, videos: bool) -> tuple[PreprocessConfig, int, VideoRule | None]:
    """How pictures and frames are prepared, pixels of a tile's side, how frames are chosen."""
    file = required_image_processor(checkpoint)
    frames = video_processor(checkpoint) or file
    processor, of_frames = (ImageProcessorConfig.from_hf(one.raw, IDEFICS3, name=one.name) for one in (file, frames))
    tile = longest_edge(file, "max_image_size", SIDE)
    if (of_frames, longest_edge(frames, "max_image_size", SIDE)) != (processor, tile):
        raise ConfigError(f"{frames.name}: tiles or normalisation of frames differ from those of pictures")
    sampling = frames.section("video_sampling") if frames.has("video_sampling") else frames
    rule = LongestEdge(
        longest=longest_edge(file, "size", 4 * SIDE),
        tile=Size(tile, tile),
        splits=file.value("do_image_splitting", bool, True),
        resample=processor.resample,
        frame_longest=longest_edge(frames, "size", longest_edge(sampling, "video_size", 4 * SIDE)) if videos else None,
        around=media_token(checkpoint, "fake_image_token", "<fake_token_around_image>"),
        whole=media_token(checkpoint, "global_image_token", "<global-img>"),
    )
    most = sampling.size("max_frames", frames.size("num_frames", FRAMES))
    video = VideoRule(
        media_token(checkpoint, "video_token", "<video>"), most, max(most, FRAMES), spread="paced", with_images=False,
        fps=sampling.value("fps", float, frames.value("fps", float, FPS)), timed=True,
    )  # fmt: skip
    return PreprocessConfig.of(rule, processor), tile, video if videos else None
