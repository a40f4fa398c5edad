"""VideoLLaMA3 in its authors' layout: other names, and bounds that all pictures of a request share (formats.md 12).

Source: DAMO-NLP-SG/VideoLLaMA3 `inference/transformers_api`.
"""

from __future__ import annotations

from dataclasses import replace

from siglane.config.language import LanguageConfig
from siglane.config.preprocess import VIDEOLLAMA3_QWEN2
from siglane.config.video import VideoRule
from siglane.families.composite import MediaFiles
from siglane.families.family import PromptRules
from siglane.families.video_llama_3 import FPS, VideoLlama3
from siglane.tiling.bounds import Bounds
from siglane.tiling.video_llama_3 import NativeFrames
from siglane.weights.hub import Checkpoint

FRAMES = 128


class VideoLlama3Qwen2(VideoLlama3):
    name = "videollama3_qwen2"
    known_as = ("Videollama3Qwen2ForCausalLM",)
    tower_prefix, projector_prefix, decoder = "model.vision_encoder.", "model.mm_projector.", "model."
    image_text, video_text, image_token_default = "<image>", "<video>", None
    tower_key, tower_type = "vision_encoder_config", "videollama3_vision_encoder"
    processor = VIDEOLLAMA3_QWEN2

    def rule(self, checkpoint: Checkpoint, media: MediaFiles) -> NativeFrames:
        file, both = media.pictures, media.processor
        pixels, resample = file.size("patch_size", 14), media.pixels.resample
        sides = (pixels * both.size("image_merge_size", 1), pixels * both.size("video_merge_size", 2))
        least, most = file.size("min_tokens", 16), file.size("max_tokens", 16384)
        picture, frame = (Bounds(side, least * side**2, most * side**2) for side in sides)
        drops_still = checkpoint.reader().value("use_token_compression", bool, True)
        return NativeFrames(picture=picture, frame=frame, resample=resample, drops_still=drops_still, shared=True)

    def video(self, checkpoint: Checkpoint, media: MediaFiles) -> VideoRule:
        most, fps = media.processor.size("max_frames", FRAMES), media.processor.value("fps", float, FPS)
        return VideoRule(self.video_token(checkpoint), most, max(most, FRAMES), spread="segments", fps=fps, timed=True)

    def language(self, checkpoint: Checkpoint) -> LanguageConfig:
        root = checkpoint.reader()
        return LanguageConfig.from_hf({**root.raw, "model_type": "qwen2"}, root.name)

    def prompt_rules(self, checkpoint: Checkpoint) -> PromptRules:
        """Their processor gives its template a variable, and for a video the number of its frames, whose texts and rows
        are siglane's to write."""
        image, video = self.image_token(checkpoint), self.video_token(checkpoint)
        rules = super().prompt_rules(checkpoint)
        return replace(rules, prologue=f"{{%- set image_token = '{image}' -%}}\n", video_text=f"{video}\n")
