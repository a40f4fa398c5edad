"""From a request's ids and media to expanded ids and items, in the process of vLLM's that reads requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from vllm.inputs import MultiModalInput, mm_input
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
    PlaceholderRange,
)
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseMultiModalProcessor, BaseProcessingInfo

from siglane.families.processor import load_processor
from siglane.hosts.asked import Described
from siglane.hosts.request import Expanded, HostRequests
from siglane.hosts.settings import VllmHostConfig
from siglane.hosts.vllm.items import SiglaneDataParser
from siglane.media.item import MediaItem
from siglane.media.messages import BUDGET_KEYS, check_keys, read_limits
from siglane.settings.options import read_environment
from siglane.tiling.rule import ImageBudget

KINDS = ("image", "video")  # the order in which siglane numbers the media of a request

Hashes = dict[str, list[str]]
Items = dict[str, list[MultiModalKwargsItem]]
Places = dict[str, list[PlaceholderRange]]


class SiglaneProcessingInfo(BaseProcessingInfo):
    """What vLLM asks about a model before any request."""

    @cached_property
    def requests(self) -> HostRequests:
        prompts = load_processor(self.get_hf_config().files())
        return HostRequests(prompts, read_environment(VllmHostConfig), read_environment(ImageBudget))

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        config, video = self.requests.config, self.requests.prompts.facts.video
        return {"image": config.max_images} | ({} if video is None else {"video": config.max_videos})

    def get_data_parser(self) -> SiglaneDataParser:
        return SiglaneDataParser()

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {kind: self.requests.largest(video=kind == "video", most_rows=seq_len)[1] for kind in mm_counts}


class SiglaneDummyInputs(BaseDummyInputsBuilder[SiglaneProcessingInfo]):
    """Requests by which vLLM measures how much memory the encoder takes."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        prompts = self.info.requests.prompts
        video = prompts.facts.video
        texts = {"image": prompts.config.image_token, "video": "" if video is None else video.token}
        return "".join(texts[kind] * mm_counts.get(kind, 0) for kind in KINDS)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        requests, found = self.info.requests, {}
        for kind, count in mm_counts.items():
            size, _ = requests.largest(video=kind == "video", most_rows=seq_len)
            picture = Image.new("RGB", size)
            found[kind] = [[picture] * requests.frames() if kind == "video" else picture] * count
        return found


class SiglaneMultiModalProcessor(BaseMultiModalProcessor[SiglaneProcessingInfo]):
    """vLLM's processors replace placeholders token by token and tell media apart by their files. siglane writes the
    whole prompt, whose words join the text around them, and tells images apart by all that changes their rows."""

    def apply(self, inputs: Any, timing_ctx: Any) -> MultiModalInput:
        """UserError, which vLLM answers with 400, for everything that is wrong with this request alone."""
        given = {kind: inputs.mm_data_items[kind].get_all() for kind in KINDS if kind in inputs.mm_data_items}
        media = [item for items in given.values() for item in items]
        with timing_ctx.record("apply_hf_processor"):
            expanded = self._expand(inputs.prompt, media, inputs.hf_processor_mm_kwargs)
        hashes, items, places = _by_kind(given, expanded)
        return mm_input(
            prompt_token_ids=expanded.token_ids,
            mm_kwargs=self._remembered(inputs.cache, hashes, items),
            mm_hashes=hashes,
            mm_placeholders=places,
        )

    def _expand(self, ids: Sequence[int], media: Sequence[MediaItem], kwargs: Mapping[str, Any]) -> Expanded:
        requests = self.info.requests
        stated = self.info.ctx.get_merged_mm_kwargs(kwargs)
        check_keys(stated, set(BUDGET_KEYS), "mm_processor_kwargs")
        limits = read_limits(stated, "mm_processor_kwargs")
        for item in media:
            item.image_limits = item.image_limits.over(limits)
        requests.pipeline.admit(media)
        for item in media:
            if item.file is None:
                requests.pipeline.read(item)  # the caller's own pictures: nothing is fetched
        return requests.expand(ids, media)

    def _remembered(self, cache: Any, hashes: Hashes, items: Items) -> MultiModalKwargsItems:
        """The items, without those that the engine's process has already."""
        if cache is None:
            return MultiModalKwargsItems(items)
        known = {kind: cache.is_cached(found) for kind, found in hashes.items()}
        missing = {
            kind: [item for item, is_known in zip(found, known[kind], strict=True) if not is_known]
            for kind, found in items.items()
        }
        updates: dict[str, list[list[Any]]] = {kind: [[] for _ in found] for kind, found in missing.items()}
        try:
            kept, _ = self._merge_mm_kwargs(cache, hashes, known, MultiModalKwargsItems(missing), updates)
        finally:
            cache.release_sender_touches()
        return kept

    def _not_asked(self, *given: Any, **more: Any) -> Any:
        raise NotImplementedError("siglane makes the items and the whole prompt itself (`apply`)")

    _get_mm_fields_config = _get_prompt_updates = _not_asked


def _by_kind(given: Mapping[str, Sequence[MediaItem]], expanded: Expanded) -> tuple[Hashes, Items, Places]:
    """Of each kind, in the order of its media: digests, items and places in the prompt."""
    index_of = {number: index for index, number in enumerate(expanded.prompt.order)}
    hashes: Hashes = {kind: [] for kind in given}
    items: Items = {kind: [] for kind in given}
    places: Places = {kind: [] for kind in given}
    for number, kind in enumerate(kind for kind, media in given.items() for _ in media):
        start, rows = expanded.stretch(index_of[number])
        hashes[kind].append(expanded.patches[number].digest.hex())
        items[kind].append(_item(expanded, number))
        places[kind].append(PlaceholderRange(start, len(rows), None if bool(rows.all()) else rows))
    return hashes, items, places


def _item(expanded: Expanded, number: int) -> MultiModalKwargsItem:
    """Image `number` of a request, all of it on the host until the tower packs it. vLLM hands on tensors alone, so what
    is no pixel is one of bytes."""
    image = expanded.patches[number]
    described = bytearray(Described(image.digest, number, expanded.asked).to_bytes())
    found = {"siglane_pixels": image.pixels, "siglane_described": torch.frombuffer(described, dtype=torch.uint8)}
    field = MultiModalBatchedField(keep_on_cpu=True)
    return MultiModalKwargsItem({name: MultiModalFieldElem(data, field) for name, data in found.items()})
