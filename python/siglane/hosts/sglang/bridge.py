"""Between SGLang's types and siglane's; it decides nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from sglang.srt.managers import mm_schedule
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem

from siglane.config.images import ImageFacts
from siglane.image.still import settled
from siglane.nn.parallel import TensorParallel
from siglane.tiling.rule import ImageBudget
from siglane.types import ImagePatches, Medium, Prompt, Size, VideoSize

TEXT = -1  # marks nothing in `span_ids`: a place of the image


@dataclass(frozen=True, slots=True)
class Asked:
    """The media of one request, from which both processes compute the same layouts (`ImageFacts.layouts`)."""

    media: tuple[Medium, ...]
    image_limits: tuple[ImageBudget, ...]

    def to_json(self) -> str:
        media = [(*one.size, *one[1:]) if isinstance(one, VideoSize) else one for one in self.media]
        return json.dumps({"media": media, "image_limits": [asdict(limits) for limits in self.image_limits]})

    @classmethod
    def from_json(cls, text: str) -> Asked:
        found = json.loads(text)
        media = tuple(
            VideoSize(Size(width, height), video[0], tuple(video[1]), video[2]) if video else Size(width, height)
            for width, height, *video in found["media"]
        )
        return cls(media, tuple(_limits(fields) for fields in found["image_limits"]))


def items_of(prompt: Prompt, patches: Sequence[ImagePatches], asked: Asked) -> list[MultimodalDataItem]:
    """One item for each image of `prompt`, in its order. patches: of the request's images, in the order of `asked`.

    An item covers all from the image's first row to its last, the text between its tiles included: SGLang batches and
    caches only items of one piece. Its identity is the digest of all that changes the image's rows.
    """
    described = asked.to_json()
    items = []
    for index, (number, image) in enumerate(zip(prompt.order, prompt.in_order(patches), strict=True)):
        spans = [span for span in prompt.spans if span.image == index]
        start, stop = spans[0].start, spans[-1].stop
        ids = torch.tensor(prompt.token_ids[start:stop])
        for span in spans:
            ids[span.start - start : span.stop - start] = TEXT
        item = MultimodalDataItem(
            modality=Modality.IMAGE,
            offsets=[(start, stop - 1)],  # SGLang counts the last one in
            feature=image.pixels,
            model_specific_data={"siglane_asked": described, "siglane_number": number, "siglane_ids": ids},
        )
        item.set_identity(image.digest)
        items.append(item)
    return items


def patches_of(item: MultimodalDataItem, facts: ImageFacts) -> ImagePatches:
    """The image of an item. ValueError when its pixels are not what its layout says."""
    asked = Asked.from_json(item.model_specific_data["siglane_asked"])
    layout = facts.layouts(asked.media, asked.image_limits)[item.model_specific_data["siglane_number"]]
    return ImagePatches(item.feature, settled(layout, item.feature, facts.preprocess), item.identity)


def span_rows(item: MultimodalDataItem, rows: torch.Tensor, embedding: torch.nn.Module) -> torch.Tensor:
    """What stands in the prompt from the item's first place to its last, `[places, D]`: `rows` `[image rows, D]`, and
    the embeddings of the text between them. RuntimeError when they do not fill it: SGLang would only warn and cut."""
    ids = item.model_specific_data["siglane_ids"].to(rows.device)
    ((start, last),) = item.offsets
    places = ids == TEXT
    if len(ids) != last + 1 - start or int(places.sum()) != len(rows):
        raise RuntimeError(f"the image has {len(rows)} rows for {int(places.sum())} of {last + 1 - start} places")
    if len(rows) == len(ids):
        return rows.clone()  # each owns its memory: SGLang caches them one by one
    filled: torch.Tensor = embedding(ids.clamp(min=0)).to(rows.dtype)
    filled[places] = rows
    return filled


def forget_rows() -> None:
    """Empties SGLang's cache of encoded images: new weights empty only its prefix cache."""
    if mm_schedule.embedding_cache is not None:
        mm_schedule.embedding_cache.clear()


def tensor_parallel() -> TensorParallel:
    """SGLang's group for one copy of the model's attention, which is one copy of the tower too."""
    from sglang.srt.runtime_context import get_parallel

    group = get_parallel().attn_tp_group
    return TensorParallel(group.rank_in_group, group.world_size, group.all_reduce, group.all_gather)


def _limits(fields: dict[str, object]) -> ImageBudget:
    pinpoints = fields.pop("grid_pinpoints")
    pairs = None if pinpoints is None else tuple((height, width) for height, width in pinpoints)  # type: ignore[attr-defined]
    return ImageBudget(**fields, grid_pinpoints=pairs)  # type: ignore[arg-type]
