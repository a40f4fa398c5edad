"""VideoLLaMA3 as transformers has it: a SigLIP with rotary positions alone, two layers and Qwen2 (formats.md 12).

Source: transformers 5.19 `models/video_llama_3`. The authors' own layout is `families/videollama3_qwen2.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from siglane.config.images import ImageFacts
from siglane.config.preprocess import VIDEO_LLAMA_3, PreprocessConfig, ProcessorClass
from siglane.config.projector import llava_projector
from siglane.config.reader import ConfigReader
from siglane.config.video import VideoRule
from siglane.config.vision import VisionConfig
from siglane.families.composite import CompositeFamily, MediaFiles, media_files
from siglane.families.family import PromptRules, chatml
from siglane.tiling.bounds import Bounds
from siglane.tiling.video_llama_3 import NativeFrames
from siglane.types import Grid
from siglane.weights.hub import Checkpoint

BLOCK = 28**2  # pixels of a merged row, by which transformers' defaults are written
FRAMES, FEWEST_FRAMES, FPS = 180, 4, 1.0  # the authors' example shows one a second; no file says otherwise


class VideoLlama3(CompositeFamily):
    """tower_key, tower_type: of config.json; processor: the class of the files of pictures and frames."""

    name = "video_llama_3"
    known_as = ("VideoLlama3ForConditionalGeneration",)
    tower_prefix, projector_prefix, decoder = "model.vision_model.", "model.projector.", "model.language_model."
    image_text, video_text = "<|image_pad|>", "<|video_pad|>"
    image_token_default: ClassVar[int | None] = 151655
    tower_key, tower_type = "vision_config", "video_llama_3_vision"
    processor: ClassVar[ProcessorClass] = VIDEO_LLAMA_3

    def images(self, checkpoint: Checkpoint) -> ImageFacts:
        root = checkpoint.reader()
        section = root.section(self.tower_key)
        section.only("model_type", self.tower_type)
        rope = section.section("rope_parameters", {})
        rope.only("rope_type", "axial")
        vision = VisionConfig.from_hf(section.raw, feature_layer=-1, post_norm=True, head=False, name=section.name)
        vision = replace(vision, position_grid=Grid(0, 0), rope_theta=rope.value("rope_theta", float, 10000.0))
        width, names = self.language(checkpoint).hidden_size, ("readout.0", "readout.2")
        root.only("mm_projector_type", "mlp2x_gelu")  # which the authors state
        projector = llava_projector(input_size=vision.hidden_size, output_size=width, names=names)
        media = media_files(checkpoint, self.processor)
        media.pictures.agree("patch_size", vision.patch_size, "the tower's", 14)
        media.pictures.only("temporal_patch_size", 1)
        preprocess = PreprocessConfig.of(self.rule(checkpoint, media), media.pixels)
        video = self.video(checkpoint, media)
        return ImageFacts(vision=vision, projector=projector, preprocess=preprocess, newline=False, video=video)

    def rule(self, checkpoint: Checkpoint, media: MediaFiles) -> NativeFrames:
        picture = _bounds(media.pictures, 1, 4 * BLOCK, 1280 * BLOCK)
        frame = _bounds(media.frames, 2, 128 * BLOCK, 768 * BLOCK)
        drops_still = media.frames.value("use_token_compression", bool, True)
        return NativeFrames(picture=picture, frame=frame, resample=media.pixels.resample, drops_still=drops_still)

    def video(self, checkpoint: Checkpoint, media: MediaFiles) -> VideoRule:
        frames = media.frames
        most = frames.size("num_frames", frames.size("max_frames", FRAMES))
        return VideoRule(
            self.video_token(checkpoint), most, max(most, FRAMES), spread="stepped",
            fps=frames.value("fps", float, FPS), timed=True,
            fewest=frames.size("num_frames", frames.size("min_frames", FEWEST_FRAMES)),
        )  # fmt: skip

    def prompt_rules(self, checkpoint: Checkpoint) -> PromptRules:
        """Of the authors' training code: a line for each picture or video, without a system's turn of its own."""
        lines = f"'image': '{self.image_token(checkpoint)}\n', 'video': '{self.video_token(checkpoint)}\n'"
        part = "{{ {" + lines + ", 'text': part['text']}[part['type']] }}"
        content = "{% for part in message['content'] %}" + part + "{% endfor %}"
        return PromptRules(default_template=chatml(content), strip_messages=False)


def _bounds(file: ConfigReader, merge: int, least: int, most: int) -> Bounds:
    """merge: patches along a row of the prompt; least, most: pixels; each where the file does not say. Older files have
    `min_pixels` and `max_pixels`, which win."""
    older = {"shortest_edge": file.raw.get("min_pixels"), "longest_edge": file.raw.get("max_pixels")}
    stated = file.section("size", {"shortest_edge": least, "longest_edge": most}).raw
    size = ConfigReader({**stated, **{key: value for key, value in older.items() if value is not None}}, file.name)
    factor = file.size("patch_size", 14) * file.size("merge_size", merge)
    return Bounds(factor, size.size("shortest_edge"), size.size("longest_edge"))
