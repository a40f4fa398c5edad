"""The module for a language model's facts."""

from __future__ import annotations

from siglane.config.language import LanguageConfig
from siglane.lm.llama import LlamaModel
from siglane.lm.qwen import QwenModel
from siglane.nn.parallel import TensorParallel


def build_language_model(config: LanguageConfig, tp: TensorParallel | None = None) -> QwenModel:
    return LlamaModel(config, tp) if config.norm_dtype == "input" else QwenModel(config, tp)
