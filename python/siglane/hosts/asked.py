"""What travels with an image from the process that cuts it to the one that encodes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from siglane.config.images import ImageFacts
from siglane.image.still import settled
from siglane.media.item import MediaItem
from siglane.tiling.rule import ImageBudget
from siglane.types import ImageLayout, ImagePatches, Medium, Size, VideoSize
from siglane.types.image import DIGEST_BYTES

NUMBER_BYTES = 4
BEFORE = DIGEST_BYTES + NUMBER_BYTES  # what stands in front of the JSON


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


class Described(NamedTuple):
    """What an encoder must know of an image beside its pixels. number: of the image among those `asked` for."""

    digest: bytes
    number: int
    asked: Asked

    def to_bytes(self) -> bytes:
        return self.digest + self.number.to_bytes(NUMBER_BYTES, "little") + self.asked.to_json().encode()

    @classmethod
    def from_bytes(cls, packed: bytes) -> Described:
        digest, number, asked = packed[:DIGEST_BYTES], packed[DIGEST_BYTES:BEFORE], packed[BEFORE:]
        return cls(digest, int.from_bytes(number, "little"), Asked.from_json(asked))

    def patches(self, pixels: torch.Tensor, facts: ImageFacts) -> ImagePatches:
        """ValueError when the pixels are not what the layout says."""
        layout = settled(self.asked.layouts(facts)[self.number], pixels, facts.preprocess)
        return ImagePatches(pixels, layout, self.digest)


def _limits(fields: dict[str, object]) -> ImageBudget:
    pinpoints = fields.pop("grid_pinpoints")
    pairs = None if pinpoints is None else tuple((height, width) for height, width in pinpoints)  # type: ignore[attr-defined]
    return ImageBudget(**fields, grid_pinpoints=pairs)  # type: ignore[arg-type]
