"""From sizes to layouts and from pixels to patches: all that an encoder needs of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from siglane.config.vlm import ImageFacts
from siglane.tiling.rule import ImageBudget
from siglane.types import DecodedImage, DecodedVideo, ImageLayout, ImagePatches, Medium


class ImageProcessor:
    """One checkpoint's image facts at work. Holds no weights; safe to share between threads."""

    config: ImageFacts

    def __init__(self, config: ImageFacts) -> None:
        self.config = config

    def layouts(
        self, media: Sequence[Medium], image_limits: Sequence[ImageBudget | None] | None = None
    ) -> tuple[ImageLayout, ...]:
        """The layouts of all images and videos of one request, from their sizes alone (`ImageFacts.layouts`)."""
        return self.config.layouts(media, image_limits)

    def patches(self, image: DecodedImage | DecodedVideo, layout: ImageLayout) -> ImagePatches:
        """Patches `[layout.patches, patch_dim]`. ValueError when the layout is another size's."""
        from siglane.image.patchify import to_patches  # torch, without which layouts can be counted

        return to_patches(image, layout, self.config.preprocess, self.config.vision)
