"""Pictures and videos of a request under siglane's media policy, before SGLang could open what a client names."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from PIL import Image
from sglang.srt.utils.common import ImageData, VideoData

from siglane.config.layout.rule import ImageBudget, no_video
from siglane.config.media import MediaConfig
from siglane.config.video import VideoRule
from siglane.errors import ImageError, UserError
from siglane.families.processor import Processor
from siglane.hosts.sglang.bridge import Asked
from siglane.image.decode import decode, from_pil, read_size
from siglane.image.source import MediaPolicy, fetch
from siglane.image.video import decode_clip, read_clip_size
from siglane.types import DIGEST_BYTES, DecodedClip, DecodedImage, Detail, ImagePatches, Medium, Size

FETCH_THREADS = 16


@dataclass(frozen=True, slots=True)
class MediaRef:
    """One medium as a request names it. source: a URL, the bytes of a file, or a picture that the caller opened; place:
    for messages; frames: shown of a video, None for a picture."""

    source: str | bytes | Image.Image
    place: str
    video: bool
    budget: ImageBudget
    frames: int | None = None


def wanted(images: Sequence[Any] | None, videos: Sequence[Any] | None) -> list[MediaRef]:
    """The media of a request, pictures first. UserError for one that siglane does not read."""
    found = []
    for video, given in ((False, images or ()), (True, videos or ())):
        kind = "video" if video else "image"
        found += [_ref(one, f"{kind}_data[{index}]", video) for index, one in enumerate(given)]
    return found


def _ref(given: Any, place: str, video: bool) -> MediaRef:
    """SGLang's OpenAI route wraps a URL and its fields in a record of its own; its other routes pass what they got."""
    if isinstance(given, str | bytes | Image.Image):
        return MediaRef(given, place, video, ImageBudget())
    if not isinstance(given, ImageData | VideoData):
        message = f"{place}: siglane reads a URL, bytes or an open picture, got {type(given).__name__}"
        raise UserError(message, code="unsupported_media")
    for name in ("max_long_side_pixel", "preprocess_kwargs"):
        if getattr(given, name) is not None:
            message = f"{place}: {name} is not known to siglane; use detail or max_dynamic_patch"
            raise UserError(message, code="unsupported_field")
    if isinstance(given, VideoData):
        return MediaRef(given.url, place, video, ImageBudget())
    detail: Detail = given.detail or "auto"
    if detail not in get_args(Detail):
        message = f"{place}: detail {detail!r} is not one of {', '.join(get_args(Detail))}"
        raise UserError(message, code="invalid_budget")
    return MediaRef(given.url, place, video, ImageBudget(detail=detail, max_tiles=given.max_dynamic_patch))


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

    def admit(self, refs: Sequence[MediaRef]) -> list[MediaRef]:
        """The same with the limits and frames that are applied. UserError for too many, or a budget that cannot be."""
        for kind, most, count in (
            ("images", self._config.max_images, sum(not ref.video for ref in refs)),
            ("videos", self._config.max_videos, sum(ref.video for ref in refs)),
        ):
            if count > most:
                raise UserError(f"the request has {count} {kind}; at most {most} are accepted", code=f"too_many_{kind}")
        return [_blaming(ref, self._admit, ref) for ref in refs]

    def fetch(self, refs: Sequence[MediaRef]) -> list[bytes | Image.Image]:
        """The files, in order; pictures that the caller opened stay as they are. ImageError names the first bad one."""
        return list(self._fetchers.map(lambda ref: _blaming(ref, self._fetch, ref), refs))

    def sizes(self, refs: Sequence[MediaRef], files: Sequence[bytes | Image.Image]) -> tuple[Medium, ...]:
        """From the files' headers. ImageError for a picture that cannot be read or is too large."""
        sizes = tuple(_blaming(ref, self._size, ref, file) for ref, file in zip(refs, files, strict=True))
        pixels, most = (
            sum(size.width * size.height for size in sizes if isinstance(size, Size)),
            self._config.max_image_pixels,
        )
        if pixels > most:
            raise ImageError(
                f"the images have {pixels} pixels together; at most {most} are accepted", code="image_too_large"
            )
        return sizes

    def hollow(self, asked: Asked) -> list[ImagePatches]:
        """Images of which only the layouts are known: enough to count a prompt's tokens. ImageError for one of too many
        patches."""
        layouts = self._processor.layouts(asked.media, asked.budgets)
        most = self._config.max_image_patches
        for number, layout in enumerate(layouts):
            if layout.patches > most:
                message = f"medium {number} would be {layout.patches} patches; at most {most} are accepted"
                raise ImageError(message, code="image_too_large")
        return [ImagePatches(torch.empty(layout.patches, 0), layout, bytes(DIGEST_BYTES)) for layout in layouts]

    def cut(self, refs: Sequence[MediaRef], files: Sequence[bytes | Image.Image], asked: Asked) -> list[ImagePatches]:
        """Patches of all media, in order. ImageError names the one that cannot be decoded."""
        layouts = self._processor.layouts(asked.media, asked.budgets)
        return [
            _blaming(
                ref, lambda ref=ref, file=file, layout=layout: self._processor.patches(self._decoded(ref, file), layout)
            )
            for ref, file, layout in zip(refs, files, layouts, strict=True)
        ]

    @property
    def _video(self) -> VideoRule:
        if self._processor.config.video is None:
            raise no_video()
        return self._processor.config.video

    def _admit(self, ref: MediaRef) -> MediaRef:
        budget = ref.budget.under(self._budget)
        self._rule.within(budget)
        frames = self._video.count(None, self._config.max_video_frames) if ref.video else None
        return replace(ref, budget=budget, frames=frames)

    def _fetch(self, ref: MediaRef) -> bytes | Image.Image:
        if not isinstance(ref.source, str):
            return ref.source
        most = self._config.max_video_bytes if ref.video else self._config.max_image_bytes
        return fetch(ref.source, replace(self._policy, max_bytes=most))

    def _size(self, ref: MediaRef, file: bytes | Image.Image) -> Medium:
        if isinstance(file, Image.Image):
            return from_pil(file, self._config.decode).size
        if ref.frames is None:
            return read_size(file, self._config.decode)
        return read_clip_size(file, self._video, ref.frames, self._config.decode)

    def _decoded(self, ref: MediaRef, file: bytes | Image.Image) -> DecodedImage | DecodedClip:
        if isinstance(file, Image.Image):
            return from_pil(file, self._config.decode)
        if ref.frames is None:
            return decode(file, self._config.decode)
        return decode_clip(file, self._video, ref.frames, self._config.decode)


def _blaming(ref: MediaRef, function: Any, *arguments: Any) -> Any:
    """SGLang's answer holds the message alone, so the place goes into it."""
    try:
        return function(*arguments)
    except UserError as error:
        if error.message.startswith(ref.place):
            raise
        raise type(error)(f"{ref.place}: {error.message}", code=error.code) from error
