"""The images and videos of one request, from what a caller names to patches.

A request's media are one list of `MediaItem`, whose items gain what each stage finds out:

    admit -> read -> lay_out (which measures) -> preprocess

Everything that can refuse one without decoding it comes before `preprocess`, the cheapest checks first. The stages are
plain functions of the items: threads, and the bytes that they hold, are the caller's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from PIL import Image

from siglane.config.images import ImageFacts
from siglane.config.preprocess import LOCAL_DECODE, DecodeConfig
from siglane.config.video import VideoRule
from siglane.errors import ImageError, UserError, blaming
from siglane.families.report import ImageReport
from siglane.image.decode import decode, decode_for, from_pil, pil_size, read_size
from siglane.image.video import chosen_pictures, decode_video, read_video_size
from siglane.media.item import MediaItem
from siglane.media.policy import LOCAL_MEDIA, MediaPolicy
from siglane.media.source import fetch, local_path, naming, open_file, read_local
from siglane.settings.media import MediaConfig
from siglane.tiling.rule import CHECKPOINT_LIMITS, ImageBudget, lay_out, no_images, no_video
from siglane.types import DecodedImage, DecodedVideo, Medium, ReducedImage, Size, VideoSize

T = TypeVar("T")

VIDEO_BYTES = 1 << 30  # of a video's file from a web server, for a local caller


class MediaPipeline:
    """The stages of a request's media, for one model.

    Of a local caller, who may read what this process may: image_limits: those of items that name none of their own
    (`ImageBudget.over`). Of a server (`for_clients`): the ceiling of its clients' (`under`). blame: puts an item's
    place on an error. UserError when the model does not know one of the limits. facts: None for a model without eyes,
    which admits nothing.
    """

    def __init__(
        self,
        facts: ImageFacts | None,
        image_limits: ImageBudget = CHECKPOINT_LIMITS,
        policy: MediaPolicy = LOCAL_MEDIA,
        decode: DecodeConfig = LOCAL_DECODE,
        *,
        caps: MediaConfig | None = None,
        blame: Callable[[UserError, str], UserError] = UserError.at,
    ) -> None:
        self._eyes, self._image_limits, self._decode_config = facts, image_limits, decode
        self._caps, self._blame = caps, blame
        if facts is not None:
            facts.preprocess.rule.within(image_limits)  # before any image, and before weights are read
        self._policy = policy
        video_bytes = max(policy.max_bytes, VIDEO_BYTES) if caps is None else caps.max_video_bytes
        self._video_policy = replace(policy, max_bytes=video_bytes)

    @classmethod
    def for_clients(
        cls,
        config: MediaConfig,
        facts: ImageFacts | None,
        ceiling: ImageBudget,
        blame: Callable[[UserError, str], UserError] = UserError.at,
    ) -> MediaPipeline:
        """The pipeline of a server, whose settings bound what its clients may ask for."""
        return cls(facts, ceiling, MediaPolicy.of(config), config.decode, caps=config, blame=blame)

    def prepare(self, items: Sequence[MediaItem]) -> None:
        """All stages, for a local caller."""
        self.admit(items)
        for item in items:
            self.read(item)
        self.lay_out(items)
        for item in items:
            self.preprocess(item)

    def admit(self, items: Sequence[MediaItem]) -> None:
        """Sets the limits, the rule and the frames that are in force. UserError for too many items, or for limits or
        frames that cannot be had."""
        if self._caps is not None:
            for kind, most, count in (
                ("images", self._caps.max_images, sum(not item.video for item in items)),
                ("videos", self._caps.max_videos, sum(item.video for item in items)),
            ):
                if count > most:
                    message = f"the request has {count} {kind}; at most {most} are accepted"
                    raise UserError(message, code=f"too_many_{kind}", param="messages")
        for item in items:
            with self.at(item):
                self._admit(item)

    def read(self, item: MediaItem) -> None:
        """Sets `file`. Raises ImageError as `fetch`; image_not_found for a local caller's missing file."""
        with self.at(item):
            self._read(item)

    def measure(self, item: MediaItem) -> Medium:
        """Sets `size`, from the file's header; of a local caller's picture that was not read nothing else is.

        Raises ImageError as `read_size` and `read_video_size`.
        """
        with self.at(item):
            if item.size is None:
                item.size = self._size(item)
            return item.size

    def lay_out(self, items: Sequence[MediaItem]) -> None:
        """Measures all items of a request and sets what the model will see of each. ImageError for too many pixels or
        patches."""
        if not items:
            return
        pixels, media = 0, []
        for item in items:
            media.append(size := self.measure(item))
            if isinstance(size, Size):
                pixels += size.width * size.height
            if self._caps is not None and pixels > (most := self._caps.max_image_pixels):
                message = f"the images have {pixels} pixels together; at most {most} are accepted"
                raise ImageError(message, code="image_too_large", param=item.param)
        layouts = lay_out(media, [item.rule.rule for item in items], self._facts.geometry)
        for item, layout in zip(items, layouts, strict=True):
            if self._caps is not None and layout.patches > (most := self._caps.max_image_patches):
                message = f"it would be {layout.patches} patches; at most {most} are accepted; ask for a smaller budget"
                with self.at(item):
                    raise ImageError(message, code="image_too_large")
            item.layout = layout

    def decode(self, item: MediaItem) -> DecodedImage | ReducedImage | DecodedVideo:
        """What the tiles of its layout are drawn from: all the pixels, or fewer where the settings allow it. Raises
        ImageError as `decode` and `decode_video`."""
        if self._decode_config.jpeg == "exact" or item.video or not isinstance(item.file, bytes):
            return self.decode_whole(item)
        with self.at(item):
            return decode_for(item.file, item.layout, self._decode_config)

    def decode_whole(self, item: MediaItem) -> DecodedImage | DecodedVideo:
        """All the pixels. Raises as `decode`."""
        with self.at(item):
            if item.pictures:
                return DecodedVideo.of([self._decoded(picture) for picture in item.pictures])
            if not item.video:
                return self._decoded(item)
            assert isinstance(item.file, bytes)
            assert item.frames is not None
            return decode_video(item.file, self._video, item.frames, self._decode_config)

    def preprocess(self, item: MediaItem) -> None:
        """Decodes and cuts: sets `patches`, settles `layout` where pixels have a say in it, and lets the file go. The
        decoded image never outlives the call."""
        from siglane.image.patchify import to_patches  # needs torch, without which layouts can be counted

        began = time.monotonic()
        image = self.decode(item)
        decoded = time.monotonic()
        with self.at(item):
            item.patches = to_patches(image, item.layout, self._facts.preprocess, self._facts.vision)
        item.layout = item.patches.layout
        item.decoding, item.cutting = decoded - began, time.monotonic() - decoded
        item.file, item.pictures = None, []

    @contextmanager
    def at(self, item: MediaItem) -> Iterator[None]:
        """Puts the item's place on what goes wrong with it, and a local file's name: a client learns no paths."""
        path = local_path(item.source) if self._caps is None else None
        with blaming(item.param, self._blame), nullcontext() if path is None else naming(path):
            yield

    def policy_of(self, item: MediaItem) -> MediaPolicy:
        return self._video_policy if item.video else self._policy

    @property
    def _facts(self) -> ImageFacts:
        if self._eyes is None:
            raise no_images()
        return self._eyes

    @property
    def _video(self) -> VideoRule:
        if self._facts.video is None:
            raise no_video()
        return self._facts.video

    def _admit(self, item: MediaItem) -> None:
        rule, wish = self._facts.preprocess.rule, item.image_limits
        if self._caps is None:
            item.image_limits = wish.over(self._image_limits)
            item.requested = item.image_limits.detail
        else:
            item.image_limits = wish.under(self._image_limits)
            item.requested = wish.detail
        item.rule = rule.within(item.image_limits)
        if not item.video or item.size is not None:
            return
        if isinstance(item.source, list | tuple):
            pictures = chosen_pictures(item.source, self._video, item.frames)
            item.pictures = [MediaItem(picture, item.param) for picture in pictures]
        else:
            item.frames = self._video.count(item.frames, None if self._caps is None else self._caps.max_video_frames)

    def _read(self, item: MediaItem) -> None:
        source = item.source
        if item.pictures:
            for picture in item.pictures:
                self.read(picture)
        elif isinstance(source, str | Path | bytes):
            item.file = self._bytes(source, self.policy_of(item))
        elif isinstance(source, Image.Image) and not item.video:
            item.file = source
        else:
            other = "list of frames" if item.video else "Pillow image"
            message = f"{item.param} must be a path, URL, bytes or {other}, got {type(source).__name__}"
            raise UserError(message, code="invalid_prompt")

    def _bytes(self, source: str | Path | bytes, policy: MediaPolicy) -> bytes:
        if isinstance(source, bytes):
            return source
        return read_local(source, policy) if self._caps is None else fetch(str(source), policy)

    def _size(self, item: MediaItem) -> Medium:
        if item.pictures:
            first = self.measure(item.pictures[0])
            assert isinstance(first, Size)
            return VideoSize(first, len(item.pictures))
        if item.file is None:
            path = local_path(item.source)
            if path is not None and self._caps is None and not item.video:
                with open_file(path) as file:
                    return read_size(file, self._decode_config)
            self._read(item)
        if isinstance(item.file, Image.Image):
            return pil_size(item.file, self._decode_config)
        assert isinstance(item.file, bytes)
        if not item.video:
            return read_size(item.file, self._decode_config)
        assert item.frames is not None
        return read_video_size(item.file, self._video, item.frames, self._decode_config)

    def _decoded(self, picture: MediaItem) -> DecodedImage:
        if isinstance(picture.file, Image.Image):
            return from_pil(picture.file, self._decode_config)
        assert isinstance(picture.file, bytes)
        with self.at(picture):
            return decode(picture.file, self._decode_config)


def several(images: Iterable[T]) -> Iterable[T]:
    """UserError for one image in place of several: of a text every letter would be a path."""
    if isinstance(images, str | bytes | Path | Mapping | Image.Image) or not isinstance(images, Iterable):
        message = f"images must be a list of images, got {type(images).__name__}; put a single one in a list"
        raise UserError(message, code="invalid_prompt", param="images")
    return images


def report_image(item: MediaItem) -> ImageReport:
    """What became of an item that is laid out."""
    layout = item.layout
    report: ImageReport = {
        "width": layout.source.width,
        "height": layout.source.height,
        "tiles": len(layout.tiles),
        "grids": [(grid.h, grid.w) for grid in layout.grids],
        "tokens": layout.image_tokens,
        "detail": {"requested": item.requested, "applied": item.rule.detail},
        "limits": item.image_limits.limits,
    }
    if layout.frames:
        report["frames"] = layout.frames
    return report
