"""A whole vision-language model: its parts' facts and the few that join them."""

from __future__ import annotations

from dataclasses import dataclass

from siglane.config.preprocess import PreprocessConfig
from siglane.config.projector import ProjectorConfig
from siglane.config.text import LanguageConfig
from siglane.config.vision import VisionConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class VlmConfig:
    """family: name in `families/registry.py`; image_token: its text in a chat template; image_token_id: what stands
    at every placeholder (may lie outside the embedding table, it is never looked up); eos_token_ids: end an answer."""

    family: str
    vision: VisionConfig
    projector: ProjectorConfig
    preprocess: PreprocessConfig
    language: LanguageConfig
    image_token: str
    image_token_id: int
    eos_token_ids: tuple[int, ...]
