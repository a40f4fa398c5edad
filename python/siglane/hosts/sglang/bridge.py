"""Between SGLang's types and siglane's; it decides nothing."""

from __future__ import annotations

import torch
from sglang.srt.managers import mm_schedule
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem

from siglane.config.images import ImageFacts
from siglane.hosts.asked import Asked, Described
from siglane.hosts.model import of_group
from siglane.hosts.request import Expanded
from siglane.nn.parallel import TensorParallel
from siglane.types import ImagePatches

TEXT = -1  # marks nothing in `span_ids`: a place of the image


def items_of(expanded: Expanded) -> list[MultimodalDataItem]:
    """One item for each image of a prompt, in its order.

    An item covers all from the image's first row to its last, the text between its tiles included: SGLang batches and
    caches only items of one piece. Its identity is the digest of all that changes the image's rows.
    """
    prompt, described = expanded.prompt, expanded.asked.to_json()
    items = []
    for index, (number, image) in enumerate(zip(prompt.order, prompt.in_order(expanded.patches), strict=True)):
        start, rows = expanded.stretch(index)
        stop = start + len(rows)
        ids = torch.tensor(prompt.token_ids[start:stop]).masked_fill(rows, TEXT)
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
    described = Described(item.identity, item.model_specific_data["siglane_number"], asked)
    return described.patches(item.feature, facts)


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

    return of_group(get_parallel().attn_tp_group)
