"""The facts of a model's eyes: what decides how an image becomes tiles, patches and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from siglane.config.preprocess import PreprocessConfig
from siglane.config.projector import ProjectorConfig
from siglane.config.video import VideoRule
from siglane.config.vision import VisionConfig
from siglane.tiling.rule import ImageBudget, ImageContext, PatchGeometry
from siglane.types import ImageLayout, Medium, VideoSize


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFacts:
    """newline: whether a learned row ends the rows of a tile map (LLaVA-OneVision); video: how videos are read, None
    for a model without them."""

    vision: VisionConfig
    projector: ProjectorConfig
    preprocess: PreprocessConfig
    newline: bool
    video: VideoRule | None

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
