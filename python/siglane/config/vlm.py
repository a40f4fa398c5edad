"""A whole vision-language model: its parts' facts and the few that join them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from siglane.config.language import LanguageConfig
from siglane.config.preprocess import PreprocessConfig
from siglane.config.projector import ProjectorConfig
from siglane.config.video import VideoRule
from siglane.config.vision import VisionConfig
from siglane.tiling.rule import ImageBudget, PatchGeometry, lay_out
from siglane.types import ImageLayout, Medium


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFacts:
    """What decides how an image becomes tiles, patches and tokens."""

    vision: VisionConfig
    projector: ProjectorConfig
    preprocess: PreprocessConfig

    @property
    def geometry(self) -> PatchGeometry:
        return PatchGeometry(self.vision.patch_size, self.projector)

    def layouts(
        self, media: Sequence[Medium], image_limits: Sequence[ImageBudget | None] | None = None
    ) -> tuple[ImageLayout, ...]:
        """The layouts of all images and videos of one request, from their sizes alone (`tiling.rule.lay_out`).

        image_limits: of each, None for the checkpoint's own. UserError as `LayoutRule.within` and `.video`.
        """
        own = self.preprocess.rule
        rules = [own if limits is None else own.within(limits).rule for limits in image_limits or [None] * len(media)]
        return lay_out(media, rules, self.geometry)


@dataclass(frozen=True, slots=True)
class Thinking:
    """start, end: token ids of `<think>` and `</think>`; forced: ids that end the reasoning of a model whose budget is
    spent, `end` among them (formats.md 3.6)."""

    start: int
    end: int
    forced: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class VlmConfig(ImageFacts):
    """family: name in `families/registry.py`; image_token: its text in a chat template; image_token_id: what stands
    at every placeholder (may lie outside the embedding table, it is never looked up); eos_token_ids: end an answer;
    image_newline: whether a learned row ends the rows of a tile map (LLaVA-OneVision); video: how videos are read, None
    for a family without them; thinking: how it marks its reasoning, None for a family that does not reason."""

    family: str
    language: LanguageConfig
    image_token: str
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    image_newline: bool
    video: VideoRule | None
    thinking: Thinking | None
