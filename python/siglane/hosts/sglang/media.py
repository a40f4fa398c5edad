"""Pictures and videos as SGLang hands them on: nothing of what a client names is opened here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from PIL import Image
from sglang.srt.utils.common import ImageData, VideoData

from siglane.errors import UserError, blaming
from siglane.hosts.request import in_message
from siglane.media.item import MediaItem
from siglane.media.messages import image_item, video_item


def wanted(images: Sequence[Any] | None, videos: Sequence[Any] | None) -> list[MediaItem]:
    """The media of a request, pictures first. UserError for one that siglane does not read."""
    return [
        *(_item(one, f"image_data[{index}]", video=False) for index, one in enumerate(images or ())),
        *(_item(one, f"video_data[{index}]", video=True) for index, one in enumerate(videos or ())),
    ]


def _item(given: Any, where: str, *, video: bool) -> MediaItem:
    """SGLang's OpenAI routes wrap a URL and its fields in a record of their own, its native route passes a text or a
    dictionary, its engine also bytes and open pictures."""
    kind, read = ("video", video_item) if video else ("image", image_item)
    if isinstance(given, ImageData | VideoData):
        given = asdict(given)
        given |= given.pop("preprocess_kwargs") or {}
    if isinstance(given, Mapping):
        names = {"url": kind, "max_dynamic_patch": "max_tiles"}
        given = {names.get(name, name): value for name, value in given.items() if value is not None}
        given.pop("content_hash", None)  # a hint for caches; siglane computes its own
    with blaming(where, in_message):
        item = read(given, where)
    if not isinstance(item.source, str | bytes | Image.Image):
        message = f"{where}: siglane reads a URL, bytes or an open picture, got {type(item.source).__name__}"
        raise UserError(message, code="unsupported_media")
    return item
