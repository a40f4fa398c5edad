"""From a request's text and media to expanded ids and items, in SGLang's tokenizer process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from sglang.srt.managers.schedule_batch import MultimodalProcessorOutput
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor

from siglane.errors import UserError
from siglane.families.processor import load_processor
from siglane.hosts.request import HostRequests
from siglane.hosts.settings import SglangHostConfig
from siglane.hosts.sglang import bridge
from siglane.hosts.sglang.media import wanted
from siglane.hosts.sglang.models.siglane_vlm import SiglaneForConditionalGeneration
from siglane.hosts.view import placeholder_id
from siglane.media.item import MediaItem
from siglane.settings.options import read_environment
from siglane.tiling.rule import ImageBudget


class SiglaneProcessor(BaseMultimodalProcessor):
    """SGLang's loaders are not used: they open any path and any address that a client names."""

    models = [SiglaneForConditionalGeneration]  # noqa: RUF012 (SGLang's own declaration)
    generates_input_ids_from_raw_prompt = True

    def __init__(self, hf_config: Any, server_args: Any, processor: Any, transport_mode: Any, **others: Any) -> None:
        super().__init__(hf_config, server_args, processor, transport_mode, **others)
        prompts = load_processor(hf_config.files())
        self.requests = HostRequests(prompts, read_environment(SglangHostConfig), read_environment(ImageBudget))

    async def process_mm_data_async(
        self,
        image_data: list[Any] | None,
        audio_data: Any,
        input_text: str | list[int],
        request_obj: Any,
        max_req_input_len: int | None = None,
        **others: Any,
    ) -> MultimodalProcessorOutput:
        """ValueError, which SGLang answers with 400, for everything that is wrong with this request alone."""
        if audio_data:
            raise UserError("this model does not read audio", code="unsupported_media")
        if getattr(request_obj, "mm_hashes", None):  # not on every request type
            raise UserError(
                "mm_hashes are not accepted: siglane tells images apart by 32 bytes", code="unsupported_field"
            )
        items = wanted(image_data, request_obj.video_data)
        self.requests.pipeline.admit(items)
        await self.requests.reader.read(items)
        return await asyncio.get_running_loop().run_in_executor(
            self.io_executor, self._process, input_text, items, max_req_input_len
        )

    def _process(
        self, text: str | list[int], items: Sequence[MediaItem], longest: int | None
    ) -> MultimodalProcessorOutput:
        expanded = self.requests.expand(text, items, longest)  # SGLang's scheduler takes only shorter ones
        place = placeholder_id(self.requests.prompts.config)
        media = bridge.items_of(expanded)
        return MultimodalProcessorOutput(input_ids=expanded.token_ids, mm_items=media, im_token_id=place)
