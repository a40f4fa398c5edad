"""Pictures of a request, from URLs to patches, off the event loop and within bounds.

Everything that can refuse a picture without decoding it comes first: count, bytes, header, pixels, prompt tokens.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

import torch

from siglane.config.preprocess import DecodeConfig
from siglane.errors import ImageError, UserError
from siglane.families.processor import Processor
from siglane.image.decode import decode, read_size
from siglane.image.source import MediaPolicy, fetch
from siglane.server.config import ServerConfig
from siglane.server.exchange import Account
from siglane.server.protocol import Detail, ImageReport
from siglane.types import DIGEST_BYTES, ImageLayout, ImagePatches, Size

P = ParamSpec("P")
T = TypeVar("T")

FETCHES_PER_REQUEST = 4  # so that one request with slow URLs does not hold every thread


class ImageRef(NamedTuple):
    """A picture that a message names. param: where, as `messages[0].content[1]`."""

    url: str
    detail: Detail | None
    param: str


class CutImage(NamedTuple):
    """A picture's patches, and the seconds that decoding and cutting took."""

    patches: ImagePatches
    decoding: float
    cutting: float


class MediaLoader:
    """Fetches, checks, decodes and cuts pictures in two bounded pools: one for waiting, one for computing."""

    def __init__(self, config: ServerConfig, processor: Processor) -> None:
        self._processor = processor
        self._policy = media_policy(config)
        self._decode = decode_config(config)
        self._max_images, self._max_pixels = config.max_images, config.max_image_pixels
        cores = config.decode_threads or min(8, os.cpu_count() or 1)
        self._fetchers = ThreadPoolExecutor(config.fetch_threads, thread_name_prefix="fetch")
        self._workers = ThreadPoolExecutor(cores, thread_name_prefix="decode")
        self._flights: dict[tuple[str, str], asyncio.Future[bytes]] = {}

    def check_count(self, refs: Sequence[ImageRef]) -> None:
        if len(refs) > self._max_images:
            message = f"the request has {len(refs)} images; at most {self._max_images} are accepted"
            raise UserError(message, code="too_many_images", param="messages")

    async def fetch(self, refs: Sequence[ImageRef], tenant: str, account: Account) -> list[bytes]:
        """The files of all pictures, in order. Raises ImageError that names the first one that cannot be had."""
        slots = asyncio.Semaphore(FETCHES_PER_REQUEST)
        return await _all(self._fetch(ref, tenant, slots, account) for ref in refs)

    async def lay_out(self, refs: Sequence[ImageRef], files: Sequence[bytes]) -> tuple[ImageLayout, ...]:
        """What the model will see of each picture, from the files' headers."""
        return await self.run(self._lay_out, refs, files)

    async def cut(
        self, refs: Sequence[ImageRef], files: Sequence[bytes], layouts: Sequence[ImageLayout], account: Account
    ) -> list[CutImage]:
        """Patches of all pictures. EngineError (503) when all requests together hold too much already."""
        cut = await _all(self._cut(*image) for image in zip(refs, files, layouts, strict=True))
        account.take(sum(image.patches.pixels.nbytes for image in cut))
        return cut

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`function` on a thread for computing."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, lambda: function(*args, **kwargs))

    def close(self) -> None:
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        self._workers.shutdown(wait=False, cancel_futures=True)

    async def _fetch(self, ref: ImageRef, tenant: str, slots: asyncio.Semaphore, account: Account) -> bytes:
        if ref.url[:5].lower() == "data:":  # computing, not waiting, and its bytes are paid for with the body
            return await self.run(_blaming, ref, fetch, ref.url, self._policy)
        async with slots:
            data = await self._fly(ref, tenant)
        account.take(len(data))
        return data

    async def _fly(self, ref: ImageRef, tenant: str) -> bytes:
        """Fetches a URL once for all requests of a tenant that ask for it at the same time."""
        key = (ref.url, tenant)
        flight = self._flights.get(key)
        if flight is None:
            loop = asyncio.get_running_loop()
            flight = loop.run_in_executor(self._fetchers, fetch, ref.url, self._policy)
            self._flights[key] = flight
            flight.add_done_callback(lambda done: self._land(key, done))
        try:
            return await asyncio.shield(flight)  # others may wait for it when this client leaves
        except ImageError as error:
            raise error.at(ref.param) from None

    def _land(self, key: tuple[str, str], flight: asyncio.Future[bytes]) -> None:
        del self._flights[key]
        if not flight.cancelled():
            flight.exception()  # seen, even when nobody waits any more

    def _lay_out(self, refs: Sequence[ImageRef], files: Sequence[bytes]) -> tuple[ImageLayout, ...]:
        sizes: list[Size] = []
        for ref, data in zip(refs, files, strict=True):
            sizes.append(_blaming(ref, read_size, data, self._decode))
            pixels = sum(size.width * size.height for size in sizes)
            if pixels > self._max_pixels:
                message = f"the images have {pixels} pixels together; at most {self._max_pixels} are accepted"
                raise ImageError(message, code="image_too_large", param=ref.param)
        return self._processor.layouts(sizes)

    async def _cut(self, ref: ImageRef, data: bytes, layout: ImageLayout) -> CutImage:
        def work() -> CutImage:  # one job, so that the decoded picture never outlives it
            began = time.monotonic()
            image = _blaming(ref, decode, data, self._decode)
            decoded = time.monotonic()
            patches = self._processor.patches(image, layout)
            return CutImage(patches, decoded - began, time.monotonic() - decoded)

        return await self.run(work)


async def _all(jobs: Iterable[Awaitable[T]]) -> list[T]:
    """All results, or the first error in order of the jobs, not of time: which one is reported must not be luck."""
    results = await asyncio.gather(*jobs, return_exceptions=True)
    done: list[T] = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        done.append(result)
    return done


def _blaming(ref: ImageRef, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    try:
        return function(*args, **kwargs)
    except ImageError as error:
        raise error.at(ref.param) from None


def media_policy(config: ServerConfig) -> MediaPolicy:
    root = config.allowed_local_media_path
    return MediaPolicy(
        allowed_local_root=None if root is None else Path(root),
        allow_http=config.allow_http_images,
        allow_private_addresses=config.allow_private_addresses,
        max_bytes=config.max_image_bytes,
        timeout=config.image_timeout,
        max_redirects=config.image_redirects,
    )


def decode_config(config: ServerConfig) -> DecodeConfig:
    return DecodeConfig(
        alpha=config.image_alpha,
        depth16=config.image_16bit,
        max_pixels=config.max_image_pixels,
        formats=config.image_formats,
    )


def hollow(layout: ImageLayout) -> ImagePatches:
    """An image of which only the layout is known; enough to write a prompt around it."""
    return ImagePatches(torch.empty(layout.patches, 0), layout, bytes(DIGEST_BYTES))


def report_image(ref: ImageRef, layout: ImageLayout) -> ImageReport:
    """What the model saw. Every family so far has one budget for all images, so `auto` is what was applied."""
    return {
        "width": layout.source.width,
        "height": layout.source.height,
        "tiles": len(layout.tiles),
        "grid": [(grid.h, grid.w) for grid in layout.grids],
        "tokens": layout.image_tokens,
        "detail": {"requested": ref.detail or "auto", "applied": "auto"},
    }
