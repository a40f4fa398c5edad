"""What the language model reads: messages, and the token ids with the spans that images fill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from siglane.types.image import ImagePatches

Role = Literal["system", "user", "assistant"]


class ImageSpan(NamedTuple):
    """Prompt positions `start..stop` (half-open) filled by rows of image number `image`."""

    start: int
    stop: int
    image: int


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """What the language model reads.

    token_ids: with the model's image token at every placeholder; spans: ascending, not overlapping; the spans of one
    image together hold exactly its layout's `rows`, in order; images: in order of first appearance.
    """

    token_ids: tuple[int, ...]
    spans: tuple[ImageSpan, ...] = ()
    images: tuple[ImagePatches, ...] = ()

    def __post_init__(self) -> None:
        rows = [0] * len(self.images)
        position = 0
        for span in self.spans:
            if not position <= span.start < span.stop <= len(self.token_ids):
                raise ValueError(f"{span} overlaps its predecessor or leaves the prompt of {len(self.token_ids)} ids")
            if not 0 <= span.image < len(rows):
                raise ValueError(f"{span} belongs to no image of {len(rows)}")
            position = span.stop
            rows[span.image] += span.stop - span.start
        expected = [image.layout.rows for image in self.images]
        if rows != expected:
            raise ValueError(f"spans hold {rows} rows, the layouts say {expected}")

    @property
    def image_tokens(self) -> int:
        return sum(image.layout.image_tokens for image in self.images)

    def cache_ids(self) -> tuple[int, ...]:
        """Token ids, every placeholder replaced by a negative number that holds its image's full digest.

        Two prompts share a prefix of cache ids only when they share its text and its images bit for bit; the row
        inside the image is given by the prefix itself.
        """
        ids = list(self.token_ids)
        for start, stop, image in self.spans:
            identity = -1 - int.from_bytes(self.images[image].digest, "little")
            ids[start:stop] = [identity] * (stop - start)
        return tuple(ids)


@dataclass(frozen=True, slots=True)
class ImagePart:
    """Image number `image` of the request stands here in a message."""

    image: int


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat; its parts in the order the user gave them."""

    role: Role
    parts: tuple[str | ImagePart, ...]
