"""What vLLM holds of a request's media, as items of siglane's."""

from __future__ import annotations

from typing import Any

from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import MultiModalDataParser, ProcessorBatchItems

from siglane.errors import UserError
from siglane.hosts.opened import are_frames, dimensions, opened_item
from siglane.hosts.request import in_message
from siglane.media.item import MediaItem


class SiglaneDataParser(MultiModalDataParser):
    """What the media connector read, and pictures that an offline caller opened or decoded."""

    def _get_subparsers(self) -> dict[str, Any]:
        return {"image": self._images, "video": self._videos}

    def _images(self, data: Any) -> ProcessorBatchItems:
        several = data if isinstance(data, list | tuple) or dimensions(data) == 4 else [data]
        return ProcessorBatchItems([_item(one, f"image[{n}]", video=False) for n, one in enumerate(several)], "image")

    def _videos(self, data: Any) -> ProcessorBatchItems:
        several = data if isinstance(data, list) and not are_frames(data) else [data]
        return ProcessorBatchItems([_item(one, f"video[{n}]", video=True) for n, one in enumerate(several)], "video")


def _item(given: Any, where: str, *, video: bool) -> MediaItem:
    match given:
        case UserError():
            raise in_message(given, where)
        case MediaItem():
            given.param = where
            return given
        case None:
            message = f"{where}: siglane takes the media themselves, not a uuid of earlier ones; send it again"
            raise UserError(message, code="unsupported_field")
        case MediaWithBytes() | (_, dict()):  # its own loaders give a video's frames and facts about them
            return _item(given[0] if isinstance(given, tuple) else given.media, where, video=video)
    return opened_item(given, where, video=video)
