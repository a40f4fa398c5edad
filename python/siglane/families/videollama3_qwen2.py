"""VideoLLaMA3 in its authors' layout: other names, and bounds that all pictures of a request share (formats.md 12).

Source: DAMO-NLP-SG/VideoLLaMA3 `inference/transformers_api`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from siglane.config.images import ImageFacts
from siglane.config.language import LanguageConfig
from siglane.config.preprocess import VIDEOLLAMA3_QWEN2
from siglane.config.reader import ConfigReader
from siglane.config.video import VideoRule
from siglane.families.family import PromptRules, VlmFamily
from siglane.families.stated import PROCESSOR
from siglane.families.video_llama_3 import FPS, VideoLlama3
from siglane.tiling.bounds import Bounds
from siglane.tiling.video_llama_3 import NativeFrames
from siglane.weights.hub import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VIDEO_TOKEN, FRAMES = "<video>", 128

# the authors' processor gives its template a variable, and for a video the number of its frames, whose texts and rows
# are siglane's to write
ARGUMENTS = (
    "{%- set image_token = '<image>' -%}{%- set told = namespace(messages=[], parts=[]) -%}"
    "{%- for message in messages -%}{%- set told.parts = message['content'] -%}"
    "{%- if message['content'] is not string -%}{%- set told.parts = [] -%}{%- for part in message['content'] -%}"
    "{%- set told.parts = told.parts + "
    f"[{{'type': 'text', 'text': '{VIDEO_TOKEN}\\n'}} if part['type'] == 'video' else part] -%}}"
    "{%- endfor -%}{%- endif -%}{%- set told.messages = told.messages + [dict(message, content=told.parts)] -%}"
    "{%- endfor -%}{%- set messages = told.messages %}\n"
)


class VideoLlama3Qwen2(VideoLlama3):
    name = "videollama3_qwen2"
    known_as = ("Videollama3Qwen2ForCausalLM",)
    decoder = "model."
    processor = VIDEOLLAMA3_QWEN2
    tower_key, tower_type = "vision_encoder_config", "videollama3_vision_encoder"
    tower_prefix, projector_prefix = "model.vision_encoder.", "model.mm_projector."

    def images(self, checkpoint: Checkpoint) -> ImageFacts:
        checkpoint.reader().choice("mm_projector_type", {"mlp2x_gelu": None}, "mlp2x_gelu")
        return super().images(checkpoint)

    def rule(self, checkpoint: Checkpoint, file: ConfigReader) -> NativeFrames:
        merges, pixels = _processor(checkpoint), file.size("patch_size", 14)
        sides = (pixels * merges.size("image_merge_size", 1), pixels * merges.size("video_merge_size", 2))
        least, most = file.size("min_tokens", 16), file.size("max_tokens", 16384)
        picture, frame = (Bounds(side, least * side**2, most * side**2) for side in sides)
        drops_still = checkpoint.reader().value("use_token_compression", bool, True)
        resample = self.pixels(file).resample
        return NativeFrames(picture=picture, frame=frame, resample=resample, drops_still=drops_still, shared=True)

    def video(self, checkpoint: Checkpoint) -> VideoRule:
        file = _processor(checkpoint)
        most = file.size("max_frames", FRAMES)
        fps = file.value("fps", float, FPS)
        return VideoRule(VIDEO_TOKEN, most, max(most, FRAMES), spread="segments", fps=fps, timed=True)

    def language(self, checkpoint: Checkpoint) -> LanguageConfig:
        root = checkpoint.reader()
        return LanguageConfig.from_hf({**root.raw, "model_type": "qwen2"}, root.name)

    def image_token(self, checkpoint: Checkpoint) -> str:
        return VlmFamily.image_token(self, checkpoint)

    def image_token_id(
        self, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerFast, language: LanguageConfig
    ) -> int:
        return checkpoint.reader().value("image_token_index", int)

    def prompt_rules(self, checkpoint: Checkpoint) -> PromptRules:
        return replace(super().prompt_rules(checkpoint), prologue=ARGUMENTS)


def _processor(checkpoint: Checkpoint) -> ConfigReader:
    return ConfigReader(checkpoint.optional(PROCESSOR), PROCESSOR)
