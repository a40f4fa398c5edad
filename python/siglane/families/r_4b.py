"""R-4B: LLaVA-OneVision with Qwen3 and a norm in front of the projector; it chooses by itself whether to think.

Source: vLLM 0.32 models/rvl.py; formats.md section 6.
"""

from __future__ import annotations

from typing import ClassVar

from siglane.config.reader import RawConfig
from siglane.families.family import PromptRules
from siglane.families.files import THINK_END
from siglane.families.llava_onevision import LlavaOnevision
from siglane.weights.hub import Checkpoint

NORM_EPS = 1e-6


class R4B(LlavaOnevision):
    """How it is spoken to is only in its chat template, which takes a variable `thinking_mode`: auto, long or short."""

    name = "r_4b"
    known_as = ("RForConditionalGeneration",)
    text_defaults: ClassVar[RawConfig] = {}
    image_token_default = None
    reads_videos = False
    pre_norm = NORM_EPS

    def prompt_rules(self, checkpoint: Checkpoint) -> PromptRules:
        return PromptRules(default_template="", strip_messages=False, thinking_end=THINK_END)
