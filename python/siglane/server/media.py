"""Pictures and videos of a request, from URLs to patches, off the event loop and within bounds.

Everything that can refuse one without decoding it comes first: count, budget, bytes, header, pixels, patches, prompt
tokens. A client's budget is never more than the server's (`ImageBudget.under`).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple, ParamSpec, TypeVar

from siglane.config.video import VideoRule
from siglane.errors import ImageError, UserError
from siglane.families.processor import ImageProcessor
from siglane.families.report import ImageReport, report_image
from siglane.image.decode import decode, read_size
from siglane.image.video import decode_video, read_video_size
from siglane.media.source import MediaPolicy, fetch
from siglane.server.context import ByteLease
from siglane.settings.server import ServerConfig
from siglane.tiling.rule import CHECKPOINT_LIMITS, ImageBudget, no_video
from siglane.types import DecodedImage, DecodedVideo, ImageLayout, ImagePatches, Medium, Size

P = ParamSpec("P")
T = TypeVar("T")

FETCHES_PER_REQUEST = 4  # so that one request with slow URLs does not hold every thread


class MediaRef(NamedTuple):
    """A picture or video that a message names. param: where, as `messages[0].content[1]`; asked: the client's budget;
    limits: the one that is applied; frames: of a video, as asked and then as admitted."""

    url: str
    param: str
    asked: ImageBudget
    video: bool = False
    frames: int | None = None
    limits: ImageBudget = CHECKPOINT_LIMITS


class PreprocessedImage(NamedTuple):
    """The patches of a picture or video, and the seconds that decoding and cutting took."""

    patches: ImagePatches
    decoding: float
    cutting: float


class MediaLoader:
    """Fetches, checks, decodes and cuts pictures and videos in two bounded pools: one for waiting, one for computing.

    budget: the server's; video: how the model reads videos, None for one that does not. UserError when the model does
    not know one of the budget's limits.
    """

    def __init__(
        self, config: ServerConfig, processor: ImageProcessor, budget: ImageBudget, video: VideoRule | None
    ) -> None:
        self._config, self._processor, self._budget, self._video_rule = config, processor, budget, video
        self._rule = processor.config.preprocess.rule
        self._rule.within(budget)
        self._policy = MediaPolicy.of(config)
        self._video_policy = replace(self._policy, max_bytes=config.max_video_bytes)
        self._decode = config.decode
        cores = config.decode_threads or min(8, os.cpu_count() or 1)
        self._fetchers = ThreadPoolExecutor(config.fetch_threads, thread_name_prefix="fetch")
        self._workers = ThreadPoolExecutor(cores, thread_name_prefix="decode")
        self._flights: dict[tuple[str, str, bool], asyncio.Future[bytes]] = {}

    def admit(self, refs: Sequence[MediaRef]) -> list[MediaRef]:
        """The same with the limits and frames that are applied. UserError for too many, or a budget that cannot be."""
        for kind, most, count in (
            ("images", self._config.max_images, sum(not ref.video for ref in refs)),
            ("videos", self._config.max_videos, sum(ref.video for ref in refs)),
        ):
            if count > most:
                message = f"the request has {count} {kind}; at most {most} are accepted"
                raise UserError(message, code=f"too_many_{kind}", param="messages")
        return [_blaming(ref, self._admit, ref) for ref in refs]

    def _admit(self, ref: MediaRef) -> MediaRef:
        limits = ref.asked.under(self._budget)
        self._rule.within(limits)
        frames = self._video.count(ref.frames, self._config.max_video_frames) if ref.video else None
        return ref._replace(limits=limits, frames=frames)

    @property
    def _video(self) -> VideoRule:
        if self._video_rule is None:
            raise no_video()
        return self._video_rule

    async def fetch(self, refs: Sequence[MediaRef], tenant: str, lease: ByteLease) -> list[bytes]:
        """The files of all pictures, in order. Raises ImageError that names the first one that cannot be had."""
        slots = asyncio.Semaphore(FETCHES_PER_REQUEST)
        return await _all(self._fetch(ref, tenant, slots, lease) for ref in refs)

    async def lay_out(self, refs: Sequence[MediaRef], files: Sequence[bytes]) -> tuple[ImageLayout, ...]:
        """What the model will see of each picture or video, from the files' headers."""
        return await self.run(self._lay_out, refs, files)

    async def cut(
        self, refs: Sequence[MediaRef], files: Sequence[bytes], layouts: Sequence[ImageLayout], lease: ByteLease
    ) -> list[PreprocessedImage]:
        """Patches of all pictures. EngineError (503) when all requests together hold too much already."""
        cut = await _all(self._cut(*medium, lease) for medium in zip(refs, files, layouts, strict=True))
        lease.take(sum(image.patches.pixels.nbytes for image in cut))
        return cut

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`function` on a thread for computing."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, lambda: function(*args, **kwargs))

    def report(self, ref: MediaRef, layout: ImageLayout) -> ImageReport:
        return report_image(layout, self._rule, ref.asked.detail, ref.limits)

    def close(self) -> None:
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        self._workers.shutdown(wait=False, cancel_futures=True)

    def _policy_of(self, ref: MediaRef) -> MediaPolicy:
        return self._video_policy if ref.video else self._policy

    async def _fetch(self, ref: MediaRef, tenant: str, slots: asyncio.Semaphore, lease: ByteLease) -> bytes:
        if ref.url[:5].lower() == "data:":  # computing, not waiting, and its bytes are paid for with the body
            return await self.run(_blaming, ref, fetch, ref.url, self._policy_of(ref))
        async with slots:
            data = await self._fly(ref, tenant)
        lease.take(len(data))
        return data

    async def _fly(self, ref: MediaRef, tenant: str) -> bytes:
        """Fetches a URL once for all requests of a tenant that ask for it at the same time."""
        key = (ref.url, tenant, ref.video)
        flight = self._flights.get(key)
        if flight is None:
            loop = asyncio.get_running_loop()
            flight = loop.run_in_executor(self._fetchers, fetch, ref.url, self._policy_of(ref))
            self._flights[key] = flight
            flight.add_done_callback(lambda done: self._land(key, done))
        try:
            return await asyncio.shield(flight)  # others may wait for it when this client leaves
        except ImageError as error:
            raise error.at(ref.param) from None

    def _land(self, key: tuple[str, str, bool], flight: asyncio.Future[bytes]) -> None:
        del self._flights[key]
        if not flight.cancelled():
            flight.exception()  # seen, even when nobody waits any more

    def _lay_out(self, refs: Sequence[MediaRef], files: Sequence[bytes]) -> tuple[ImageLayout, ...]:
        media: list[Medium] = []
        pixels, most = 0, self._config.max_image_pixels
        for ref, data in zip(refs, files, strict=True):
            media.append(_blaming(ref, self._read_size, ref, data))
            if isinstance(size := media[-1], Size):
                pixels += size.width * size.height
            if pixels > most:
                message = f"the images have {pixels} pixels together; at most {most} are accepted"
                raise ImageError(message, code="image_too_large", param=ref.param)
        layouts = self._processor.layouts(media, [ref.limits for ref in refs])
        for ref, layout in zip(refs, layouts, strict=True):
            _blaming(ref, self._check_patches, layout)
        return layouts

    def _read_size(self, ref: MediaRef, data: bytes) -> Medium:
        if ref.frames is None:
            return read_size(data, self._decode)
        return read_video_size(data, self._video, ref.frames, self._decode)

    def _check_patches(self, layout: ImageLayout) -> None:
        most = self._config.max_image_patches
        if layout.patches > most:
            message = f"it would be {layout.patches} patches; at most {most} are accepted; ask for a smaller budget"
            raise ImageError(message, code="image_too_large")

    def _decoded(self, ref: MediaRef, data: bytes) -> DecodedImage | DecodedVideo:
        if ref.frames is None:
            return decode(data, self._decode)
        return decode_video(data, self._video, ref.frames, self._decode)

    async def _cut(self, ref: MediaRef, data: bytes, layout: ImageLayout, lease: ByteLease) -> PreprocessedImage:
        def work() -> PreprocessedImage:  # one job, so that the decoded picture never outlives it
            began = time.monotonic()
            image = self._decoded(ref, data)
            decoded = time.monotonic()
            patches = self._processor.patches(image, layout)
            return PreprocessedImage(patches, decoded - began, time.monotonic() - decoded)

        # a still picture's pixels are few beside its patches; the frames of a video wait in memory for each other
        held = layout.source.width * layout.source.height * 3 * layout.frames
        lease.take(held)
        try:
            return await self.run(_blaming, ref, work)
        finally:
            lease.give(held)


async def _all(jobs: Iterable[Awaitable[T]]) -> list[T]:
    """All results, or the first error in order of the jobs, not of time: which one is reported must not be luck."""
    results = await asyncio.gather(*jobs, return_exceptions=True)
    done: list[T] = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        done.append(result)
    return done


def _blaming(ref: MediaRef, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    try:
        return function(*args, **kwargs)
    except UserError as error:
        raise error.at(ref.param) from None
