"""A whole vision-language model: its parts' facts and the few that join them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from siglane.config.preprocess import PreprocessConfig
from siglane.config.projector import ProjectorConfig
from siglane.config.text import LanguageConfig
from siglane.config.tokens import image_layout
from siglane.config.vision import VisionConfig
from siglane.types import ImageLayout, Size


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFacts:
    """What decides how an image becomes tiles, patches and tokens."""

    vision: VisionConfig
    projector: ProjectorConfig
    preprocess: PreprocessConfig

    def layouts(self, sizes: Sequence[Size]) -> tuple[ImageLayout, ...]:
        """The layouts of all images of one request, from their sizes alone."""
        alone = len(sizes) == 1
        return tuple(
            image_layout(size, self.preprocess, self.projector, self.vision.patch_size, alone=alone) for size in sizes
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VlmConfig(ImageFacts):
    """family: name in `families/registry.py`; image_token: its text in a chat template; image_token_id: what stands
    at every placeholder (may lie outside the embedding table, it is never looked up); eos_token_ids: end an answer."""

    family: str
    language: LanguageConfig
    image_token: str
    image_token_id: int
    eos_token_ids: tuple[int, ...]
