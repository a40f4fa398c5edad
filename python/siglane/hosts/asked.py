"""What travels with an image from the process that cuts it to the one that encodes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from siglane.config.images import ImageFacts
from siglane.media.item import MediaItem
from siglane.tiling.rule import ImageBudget
from siglane.types import ImageLayout, Medium, Size, VideoSize


@dataclass(frozen=True, slots=True)
class Asked:
    """The media of one request, from which both processes compute the same layouts (`ImageFacts.layouts`)."""

    media: tuple[Medium, ...]
    image_limits: tuple[ImageBudget, ...]

    @classmethod
    def of(cls, items: Sequence[MediaItem]) -> Asked:
        """items: measured."""
        sizes = tuple(item.size for item in items if item.size is not None)
        return cls(sizes, tuple(item.image_limits for item in items))

    def layouts(self, facts: ImageFacts) -> tuple[ImageLayout, ...]:
        return facts.layouts(self.media, self.image_limits)

    def to_json(self) -> str:
        media = [(*one.size, *one[1:]) if isinstance(one, VideoSize) else one for one in self.media]
        return json.dumps({"media": media, "image_limits": [asdict(limits) for limits in self.image_limits]})

    @classmethod
    def from_json(cls, text: str | bytes) -> Asked:
        found = json.loads(text)
        media = tuple(
            VideoSize(Size(width, height), video[0], tuple(video[1]), video[2]) if video else Size(width, height)
            for width, height, *video in found["media"]
        )
        return cls(media, tuple(_limits(fields) for fields in found["image_limits"]))


def _limits(fields: dict[str, object]) -> ImageBudget:
    pinpoints = fields.pop("grid_pinpoints")
    pairs = None if pinpoints is None else tuple((height, width) for height, width in pinpoints)  # type: ignore[attr-defined]
    return ImageBudget(**fields, grid_pinpoints=pairs)  # type: ignore[arg-type]
