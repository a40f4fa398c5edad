"""Pictures and videos of a request under siglane's media policy, before SGLang could open what a client names."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from PIL import Image
from sglang.srt.utils.common import ImageData, VideoData

from siglane.config.images import ImageFacts
from siglane.errors import UserError, blaming
from siglane.families.pipeline import MediaPipeline
from siglane.media.item import MediaItem
from siglane.media.messages import image_item, video_item
from siglane.settings.media import MediaConfig
from siglane.tiling.rule import ImageBudget

FETCH_THREADS = 64  # they wait for web servers most of the time


def in_message(error: UserError, param: str) -> UserError:
    """SGLang's answer holds the message alone, so the place goes into it."""
    return error if error.message.startswith(param) else UserError(f"{param}: {error.message}", code=error.code)


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


class HostMedia:
    """The stages of a request's media in SGLang's tokenizer process.

    image_limits: the operator's ceiling (`ImageBudget.under`). UserError when the model does not know one of them.
    """

    def __init__(self, config: MediaConfig, facts: ImageFacts, image_limits: ImageBudget) -> None:
        self.pipeline = MediaPipeline.for_clients(config, facts, image_limits, in_message)
        self._fetchers = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="siglane-fetch")

    async def fetch(self, items: Sequence[MediaItem]) -> None:
        """Reads all files; pictures that the caller opened stay as they are. ImageError names a bad one.

        What comes over the network waits on threads of its own: a slow web server holds up nobody else.
        """
        loop = asyncio.get_running_loop()
        jobs = [(self._fetchers if _is_remote(item.source) else None, item) for item in items]
        await asyncio.gather(*(loop.run_in_executor(pool, self.pipeline.read, item) for pool, item in jobs))


def _is_remote(source: object) -> bool:
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))
