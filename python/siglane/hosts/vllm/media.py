"""Pictures and videos of a request, under siglane's media policy, before vLLM could open what a client names."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

from siglane.errors import UserError
from siglane.families.pipeline import MediaPipeline
from siglane.hosts.doctor import resolve
from siglane.hosts.request import MediaReader
from siglane.hosts.settings import VllmHostConfig
from siglane.media.item import MediaItem
from siglane.media.messages import image_item, video_item
from siglane.settings.options import read_environment
from siglane.tiling.rule import CHECKPOINT_LIMITS

PARTS = (  # what reads one part of a message: in vLLM 0.32, since 0.33
    "vllm.renderers.chat_utils:_parse_chat_message_content_mm_part",
    "vllm.renderers.chat_utils.chat_message:parse_chat_message_content_mm_part",
)
NO_FIELDS = {"type", "url", "image_url", "uuid"}  # of a part of a message

Fetched = MediaItem | UserError  # a request's refusal names the item by its number, which is not known here yet


class MediaUrl(str):
    """A URL with the fields that a client gave beside it. vLLM hands on texts alone."""

    fields: Mapping[str, Any]

    def __new__(cls, url: str, fields: Mapping[str, Any]) -> MediaUrl:
        found = super().__new__(cls, url)
        found.fields = fields
        return found


def keep_fields() -> None:
    """Makes vLLM's reader of messages hand on `detail` and its like, which it drops without a word. ImportError or
    AttributeError where this vLLM has another reader."""
    original = resolve(*PARTS)
    if original.__module__ == __name__:
        return

    def with_fields(part: Any) -> tuple[str, Any]:
        kind, content = original(part)
        if not isinstance(content, str) or kind not in ("image_url", "video_url", "input_image"):
            return kind, content
        given = part if kind == "input_image" else part[kind]
        fields = dict(given) if isinstance(given, Mapping) else {}
        return kind, MediaUrl(content, {name: fields[name] for name in fields.keys() - NO_FIELDS})

    setattr(sys.modules[original.__module__], original.__name__, with_fields)


@cache
def _reader() -> MediaReader:
    """Of this process. It measures nothing, so it needs no model."""
    config = read_environment(VllmHostConfig)
    return MediaReader(MediaPipeline.for_clients(config, None, CHECKPOINT_LIMITS, lambda error, _: error))


class SiglaneMediaConnector:
    """In place of vLLM's own. media_io_kwargs: for each kind of media what its request says about all of them."""

    def __init__(self, media_io_kwargs: Mapping[str, Mapping[str, Any]] | None = None, **others: Any) -> None:
        self._fields = media_io_kwargs or {}

    async def fetch_image_async(self, image_url: str, **others: Any) -> Fetched:
        return await _reader().elsewhere(image_url, lambda: self.fetch_image(image_url))

    async def fetch_video_async(self, video_url: str, **others: Any) -> Fetched:
        return await _reader().elsewhere(video_url, lambda: self.fetch_video(video_url))

    def fetch_image(self, image_url: str, **others: Any) -> Fetched:
        return self._fetch(image_url, "image")

    def fetch_video(self, video_url: str, **others: Any) -> Fetched:
        return self._fetch(video_url, "video")

    def fetch_audio(self, audio_url: str) -> Fetched:
        raise UserError("this model does not read audio", code="unsupported_media")

    def _fetch(self, url: str, kind: str) -> Fetched:
        own = url.fields if isinstance(url, MediaUrl) else {}
        given = {**self._fields.get(kind, {}), **{name: value for name, value in own.items() if value is not None}}
        try:
            item = (video_item if kind == "video" else image_item)({**given, kind: str(url)}, kind)
            _reader().pipeline.read(item)
        except UserError as error:
            return error
        return item
