"""Idefics3, SmolVLM, SmolVLM2, SmolDocling and granite-docling: a SigLIP tower, pixel shuffle, one layer and a Llama.

Source: transformers 5.19 `models/idefics3` and `models/smolvlm`, which differ in videos and names alone; formats.md 11.
"""

from __future__ import annotations

from dataclasses import replace

from siglane.config.images import ImageFacts
from siglane.config.language import LanguageConfig
from siglane.config.preprocess import IDEFICS3, PreprocessConfig, longest_edge
from siglane.config.projector import pixel_shuffle_projector
from siglane.config.reader import ConfigReader, RawConfig
from siglane.config.video import VideoRule
from siglane.config.vision import IDEFICS3_SIZES, VisionConfig
from siglane.errors import ConfigError
from siglane.families.composite import CompositeFamily, MediaFiles, media_files
from siglane.families.family import PromptRules
from siglane.families.files import check_rows
from siglane.families.stated import media_token
from siglane.tiling.idefics3 import LongestEdge
from siglane.types import Size
from siglane.weights.hub import Checkpoint

SIDE, FRAMES, FPS = 364, 64, 1.0  # pixels of a tile, of which a picture is four long; of a video; where no file says so

# `SmolVLMProcessor` takes its own for every request with a video: those of checkpoints have no place for one
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}{% for part in message['content'] %}"
    "{{ {'image': '<image>', 'video': '<video>', 'text': part['text']}[part['type']] }}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


class Idefics3(CompositeFamily):
    name = "idefics3"
    known_as = ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration")
    tower_prefix, projector_prefix, decoder = "[model.]vision_model.", "[model.]connector.", "[model.]text_model."
    tied_at_root = eos_ends = True
    image_token_default = 128257

    def matches(self, root: RawConfig, checkpoint: Checkpoint) -> bool:
        return root.get("model_type") in ("idefics3", "smolvlm")

    def images(self, checkpoint: Checkpoint) -> ImageFacts:
        root = checkpoint.reader()
        tower, factor = root.section("vision_config"), root.size("scale_factor", 2)
        vision = VisionConfig.from_hf(
            tower.raw, feature_layer=-1, post_norm=True, head=False, defaults=IDEFICS3_SIZES,
            position_resize="bucketised", name=tower.name,
        )  # fmt: skip
        media = media_files(checkpoint, IDEFICS3)
        rule, video = self.rule(checkpoint, media), None
        side = rule.tile.width // vision.patch_size
        check_rows(side, factor, "config.json: scale_factor", media.processor, "image_seq_len")
        width, name = self.language(checkpoint).hidden_size, "modality_projection.proj"
        projector = pixel_shuffle_projector(factor, input_size=vision.hidden_size, output_size=width, name=name)
        if root.raw["model_type"] == "smolvlm":
            rule, video = self.videos(checkpoint, media.frames, rule)
        preprocess = PreprocessConfig.of(rule, media.pixels)
        return ImageFacts(vision=vision, projector=projector, preprocess=preprocess, newline=False, video=video)

    def rule(self, checkpoint: Checkpoint, media: MediaFiles) -> LongestEdge:
        file, frames = media.pictures, media.frames
        tile, of_frames = (longest_edge(one, "max_image_size", SIDE) for one in (file, frames))
        if tile != of_frames:
            raise ConfigError(f"{frames.name}: max_image_size {of_frames} of frames is not the {tile} of pictures")
        return LongestEdge(
            longest=longest_edge(file, "size", 4 * SIDE),
            tile=Size(tile, tile),
            splits=file.value("do_image_splitting", bool, True),
            resample=media.pixels.resample,
            frame_longest=None,
            around=media_token(checkpoint, "fake_image_token", "<fake_token_around_image>"),
            whole=media_token(checkpoint, "global_image_token", "<global-img>"),
        )

    def videos(self, checkpoint: Checkpoint, frames: ConfigReader, rule: LongestEdge) -> tuple[LongestEdge, VideoRule]:
        """The rule with frames, and which are shown."""
        sampling = frames.section("video_sampling", frames.raw)
        longest = longest_edge(frames, "size", longest_edge(sampling, "video_size", 4 * SIDE))
        most = sampling.size("max_frames", frames.size("num_frames", FRAMES))
        video = VideoRule(
            self.video_token(checkpoint), most, max(most, FRAMES), spread="paced", with_images=False,
            fps=sampling.value("fps", float, frames.value("fps", float, FPS)), timed=True,
        )  # fmt: skip
        return replace(rule, frame_longest=longest), video

    def text(self, section: ConfigReader) -> LanguageConfig:
        section.only("model_type", "llama")
        return LanguageConfig.from_llama(section.raw, section.name)

    def prompt_rules(self, checkpoint: Checkpoint) -> PromptRules:
        return PromptRules(default_template=CHAT_TEMPLATE, strip_messages=False, video_template=CHAT_TEMPLATE)
