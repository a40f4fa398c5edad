"""What the language model reads: messages, and the token ids with the spans that images fill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

from siglane.types.image import ImagePatches
from siglane.types.layout import ImageLayout

Role = Literal["system", "user", "assistant", "tool"]

OfImage = TypeVar("OfImage")


class ImageSpan(NamedTuple):
    """Prompt positions `start..stop` (half-open) filled by rows of image number `image` of the prompt."""

    start: int
    stop: int
    image: int


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """What the language model reads. It knows the layouts of its images; their pixels travel beside it (`Request`).

    The spans of one image together hold exactly its layout's `rows`, in order. ValueError for a contradiction.
    """

    token_ids: tuple[int, ...]  # with the model's image token at every placeholder
    spans: tuple[ImageSpan, ...] = ()  # ascending, not overlapping
    layouts: tuple[ImageLayout, ...] = ()  # of the images, in order of first appearance
    order: tuple[int, ...] = ()  # which image of the messages' numbering each of them is

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(self.layouts))):
            raise ValueError(f"the order {self.order} does not name each of {len(self.layouts)} images once")
        rows = [0] * len(self.layouts)
        position = 0
        for span in self.spans:
            if not position <= span.start < span.stop <= len(self.token_ids):
                raise ValueError(f"{span} overlaps its predecessor or leaves the prompt of {len(self.token_ids)} ids")
            if not 0 <= span.image < len(rows):
                raise ValueError(f"{span} belongs to no image of {len(rows)}")
            position = span.stop
            rows[span.image] += span.stop - span.start
        expected = [layout.rows for layout in self.layouts]
        if rows != expected:
            raise ValueError(f"spans hold {rows} rows, the layouts say {expected}")

    @property
    def image_tokens(self) -> int:
        return sum(layout.image_tokens for layout in self.layouts)

    def in_order(self, images: Sequence[OfImage]) -> tuple[OfImage, ...]:
        """What belongs to each image, from the messages' order into the prompt's. ValueError for another number."""
        if len(images) != len(self.order):
            raise ValueError(f"the prompt has {len(self.order)} images, {len(images)} are given")
        return tuple(images[number] for number in self.order)

    def settled(self, images: Sequence[ImagePatches]) -> Prompt:
        """The prompt with as many rows as `images`, in its order, were found to have once their pixels were known."""
        layouts = tuple(image.layout for image in images)
        if layouts == self.layouts:
            return self
        counts = [iter(layout.placeholders) for layout in layouts]
        ids: list[int] = []
        spans, end = [], 0
        for start, stop, image in self.spans:
            ids += self.token_ids[end:start]
            rows = next(counts[image]) if layouts[image] != self.layouts[image] else stop - start
            spans.append(ImageSpan(len(ids), len(ids) + rows, image))
            ids += self.token_ids[start : start + rows]
            end = stop
        return Prompt((*ids, *self.token_ids[end:]), tuple(spans), layouts, self.order)

    def check_images(self, images: Sequence[ImagePatches]) -> None:
        """ValueError unless `images` are those the prompt was written for, in its order."""
        if len(images) != len(self.layouts):
            raise ValueError(f"the prompt has {len(self.layouts)} images, {len(images)} are given")
        for number, (image, layout) in enumerate(zip(images, self.layouts, strict=True)):
            if image.layout != layout:
                raise ValueError(f"image {number} does not have the layout that the prompt was written for")


@dataclass(frozen=True, slots=True)
class ImagePart:
    """Image number `image` of the request stands here in a message."""

    image: int


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that an earlier answer made. arguments: as the model wrote them, usually a JSON object."""

    name: str
    arguments: str
    call_id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat; its parts in the order the user gave them.

    tool_calls: an assistant's; tool_call_id, name: of the call and the function whose result a tool's turn is.
    """

    role: Role
    parts: tuple[str | ImagePart, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""

    @property
    def characters(self) -> int:
        """Of all its texts."""
        texts = [part for part in self.parts if isinstance(part, str)]
        return sum(map(len, texts)) + sum(len(call.name) + len(call.arguments) for call in self.tool_calls)
