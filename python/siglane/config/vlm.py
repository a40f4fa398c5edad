"""A whole vision-language model: its parts' facts and the few that join them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from siglane.config.language import LanguageConfig
from siglane.config.preprocess import PreprocessConfig
from siglane.config.projector import ProjectorConfig
from siglane.config.video import VideoRule
from siglane.config.vision import VisionConfig
from siglane.tiling.rule import ImageBudget, ImageContext, PatchGeometry
from siglane.types import ImageLayout, Medium, VideoSize


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFacts:
    """What decides how an image becomes tiles, patches and tokens."""

    vision: VisionConfig
    projector: ProjectorConfig
    preprocess: PreprocessConfig

    def layouts(
        self, media: Sequence[Medium], budgets: Sequence[ImageBudget | None] | None = None
    ) -> tuple[ImageLayout, ...]:
        """The layouts of all images and videos of one request, from their sizes alone.

        budgets: one for each, None for the checkpoint's own limits. UserError as `LayoutRule.within` and `.video`.
        Videos do not count when images are: one image beside a video is tiled as if alone, as the references do.
        """
        geometry = PatchGeometry(self.vision.patch_size, self.projector)
        limits = budgets or [None] * len(media)
        images = sum(not isinstance(medium, VideoSize) for medium in media)
        found: list[ImageLayout] = []
        for medium, budget in zip(media, limits, strict=True):
            rule = self.preprocess.rule if budget is None else self.preprocess.rule.within(budget).rule
            if isinstance(medium, VideoSize):
                found.append(rule.video(medium, geometry))
            else:
                index = sum(layout.frames == 0 for layout in found)
                found.append(rule.image(medium, geometry, ImageContext(index, images)))
        return tuple(found)


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
