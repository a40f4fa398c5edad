"""The facts of a model's eyes: what decides how an image becomes tiles, patches and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from siglane.config.preprocess import PreprocessConfig
from siglane.config.projector import ProjectorConfig
from siglane.config.video import VideoRule
from siglane.config.vision import VisionConfig
from siglane.tiling.rule import ImageBudget, PatchGeometry, lay_out
from siglane.types import ImageLayout, Medium


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFacts:
    """newline: whether a learned row ends the rows of a tile map (LLaVA-OneVision); video: how videos are read, None
    for a model without them."""

    vision: VisionConfig
    projector: ProjectorConfig
    preprocess: PreprocessConfig
    newline: bool
    video: VideoRule | None

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
