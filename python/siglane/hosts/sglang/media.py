"""Pictures and videos of a request under siglane's media policy, before SGLang could open what a client names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any, ParamSpec, TypeVar

from PIL import Image
from sglang.srt.utils.common import ImageData, VideoData

from siglane.config.video import VideoRule
from siglane.errors import ImageError, UserError
from siglane.families.pipeline import MediaItem, image_item, video_item
from siglane.families.processor import Processor
from siglane.hosts.sglang.bridge import Asked
from siglane.image.decode import decode, from_pil, read_size
from siglane.image.video import decode_video, read_video_size
from siglane.media.source import MediaPolicy, fetch
from siglane.settings.media import MediaConfig
from siglane.tiling.rule import ImageBudget, no_video
from siglane.types import DecodedImage, DecodedVideo, ImageLayout, ImagePatches, Medium, Size

P = ParamSpec("P")
Result = TypeVar("Result")

File = bytes | Image.Image
FETCH_THREADS = 64  # they wait for web servers most of the time


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
    item = _blaming(where, read, given, where)
    if not isinstance(item.source, str | bytes | Image.Image):
        message = f"{where}: siglane reads a URL, bytes or an open picture, got {type(item.source).__name__}"
        raise UserError(message, code="unsupported_media")
    return item


class HostMedia:
    """Fetches, checks, decodes and cuts. Everything that can refuse a picture without decoding it comes first.

    budget: the operator's ceiling (`ImageBudget.under`). UserError when the model does not know one of its limits.
    """

    def __init__(self, config: MediaConfig, processor: Processor, budget: ImageBudget) -> None:
        self._config, self._processor, self._budget = config, processor, budget
        self._rule = processor.config.preprocess.rule
        self._rule.within(budget)
        self._policy = MediaPolicy.of(config)
        self._fetchers = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="siglane-fetch")

    def admit(self, items: Sequence[MediaItem]) -> list[MediaItem]:
        """The same with the limits and frames that are applied. UserError for too many, or a budget that cannot be."""
        for kind, most, count in (
            ("images", self._config.max_images, sum(not item.video for item in items)),
            ("videos", self._config.max_videos, sum(item.video for item in items)),
        ):
            if count > most:
                raise UserError(f"the request has {count} {kind}; at most {most} are accepted", code=f"too_many_{kind}")
        return [_blaming(item.where, self._admit, item) for item in items]

    async def fetch(self, items: Sequence[MediaItem]) -> list[File]:
        """The files, in order; pictures that the caller opened stay as they are. ImageError names a bad one.

        What comes over the network waits on threads of its own: a slow web server holds up nobody else.
        """
        loop = asyncio.get_running_loop()
        return await asyncio.gather(
            *(
                loop.run_in_executor(
                    self._fetchers if _is_remote(item.source) else None, _blaming, item.where, self._fetch, item
                )
                for item in items
            )
        )

    def sizes(self, items: Sequence[MediaItem], files: Sequence[File]) -> tuple[Medium, ...]:
        """From the files' headers. ImageError for a picture that cannot be read or is too large."""
        sizes = tuple(_blaming(item.where, self._size, item, file) for item, file in zip(items, files, strict=True))
        pixels = sum(size.width * size.height for size in sizes if isinstance(size, Size))
        if pixels > (most := self._config.max_image_pixels):
            message = f"the images have {pixels} pixels together; at most {most} are accepted"
            raise ImageError(message, code="image_too_large")
        return sizes

    def lay_out(self, items: Sequence[MediaItem], asked: Asked) -> tuple[ImageLayout, ...]:
        """What the model will see of each. ImageError for one of too many patches."""
        layouts = self._processor.layouts(asked.media, asked.budgets)
        most = self._config.max_image_patches
        for item, layout in zip(items, layouts, strict=True):
            if layout.patches > most:
                message = f"{item.where} would be {layout.patches} patches; at most {most} are accepted"
                raise ImageError(message, code="image_too_large")
        return layouts

    def cut(
        self, items: Sequence[MediaItem], files: Sequence[File], layouts: Sequence[ImageLayout]
    ) -> list[ImagePatches]:
        """Patches of all media, in order. ImageError names the one that cannot be decoded."""
        return [
            self._processor.patches(_blaming(item.where, self._decoded, item, file), layout)
            for item, file, layout in zip(items, files, layouts, strict=True)
        ]

    @property
    def _video(self) -> VideoRule:
        if self._processor.config.video is None:
            raise no_video()
        return self._processor.config.video

    def _admit(self, item: MediaItem) -> MediaItem:
        budget = item.budget.under(self._budget)
        self._rule.within(budget)
        frames = self._video.count(item.frames, self._config.max_video_frames) if item.video else None
        return replace(item, budget=budget, frames=frames)

    def _fetch(self, item: MediaItem) -> File:
        if isinstance(item.source, str):
            most = self._config.max_video_bytes if item.video else self._config.max_image_bytes
            return fetch(item.source, replace(self._policy, max_bytes=most))
        assert isinstance(item.source, bytes | Image.Image)
        return item.source

    def _size(self, item: MediaItem, file: File) -> Medium:
        if isinstance(file, Image.Image):
            return from_pil(file, self._config.decode).size
        if item.frames is None:
            return read_size(file, self._config.decode)
        return read_video_size(file, self._video, item.frames, self._config.decode)

    def _decoded(self, item: MediaItem, file: File) -> DecodedImage | DecodedVideo:
        if isinstance(file, Image.Image):
            return from_pil(file, self._config.decode)
        if item.frames is None:
            return decode(file, self._config.decode)
        return decode_video(file, self._video, item.frames, self._config.decode)


def _is_remote(source: object) -> bool:
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def _blaming(where: str, function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
    """SGLang's answer holds the message alone, so the place goes into it."""
    try:
        return function(*args, **kwargs)
    except UserError as error:
        if error.message.startswith(where):
            raise
        raise UserError(f"{where}: {error.message}", code=error.code) from error
