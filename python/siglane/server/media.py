"""Pictures and videos of a request off the event loop and within bounds: threads, one flight per URL, bytes in flight.

What each stage does to them, and what refuses them, is `families/pipeline.py`'s.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import ParamSpec, TypeVar

from siglane.config.images import ImageFacts
from siglane.errors import UserError
from siglane.families.pipeline import MediaPipeline
from siglane.media.item import MediaItem
from siglane.media.policy import MediaPolicy
from siglane.media.source import fetch
from siglane.server.context import ByteLease
from siglane.settings.server import ServerConfig
from siglane.tiling.rule import ImageBudget
from siglane.types import ImagePatches
from siglane.types.byte_cache import ByteCache

P = ParamSpec("P")
T = TypeVar("T")

PATCH_CACHE_BYTES = 128 << 20
FETCHES_PER_REQUEST = 4  # so that one request with slow URLs does not hold every thread

Flight = tuple[str, MediaPolicy, str]  # URL, what it may be, tenant


class MediaLoader:
    """Runs the stages of `MediaPipeline` in two bounded pools: one for waiting, one for computing. What equal files
    become is kept, within `patch_cache_bytes` and for the same tenant.

    image_limits: the server's. UserError when the model does not know one of them.
    """

    def __init__(self, config: ServerConfig, facts: ImageFacts | None, image_limits: ImageBudget) -> None:
        # its stages block: call them on `run`
        self.pipeline = MediaPipeline.for_clients(config, facts, image_limits)
        self.decode_threads = config.decode_threads or min(8, os.cpu_count() or 1)
        self._fetchers = ThreadPoolExecutor(config.fetch_threads, thread_name_prefix="fetch")
        self._workers = ThreadPoolExecutor(self.decode_threads, thread_name_prefix="decode")
        self._flights: dict[Flight, asyncio.Future[bytes]] = {}
        self._decodings: dict[Hashable, asyncio.Future[ImagePatches]] = {}
        kept = config.patch_cache_bytes
        # by what they were made from
        self._patches = ByteCache[Hashable, ImagePatches](PATCH_CACHE_BYTES if kept is None else kept)

    def admit(self, items: Sequence[MediaItem], whole: str = "messages") -> None:
        """UserError for too many items, or limits that cannot be had. whole: what to blame for all of them."""
        try:
            self.pipeline.admit(items)
        except UserError as error:
            raise (error.at(whole) if error.param == "messages" else error) from None

    async def fetch(self, items: Sequence[MediaItem], tenant: str, lease: ByteLease) -> None:
        """Reads all files. Raises ImageError that names the first one that cannot be had."""
        slots = asyncio.Semaphore(FETCHES_PER_REQUEST)
        await _all(self._fetch(item, tenant, slots, lease) for item in items)

    async def lay_out(self, items: Sequence[MediaItem]) -> None:
        """What the model will see of each item, from the files' headers."""
        await self.run(self.pipeline.lay_out, items)

    async def preprocess(self, items: Sequence[MediaItem], tenant: str, lease: ByteLease) -> None:
        """Patches of all items. EngineError (503) when all requests together hold too much already."""
        await _all(self._preprocess(item, tenant, lease) for item in items)
        lease.take(sum(item.patches.pixels.nbytes for item in items))

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`function` on a thread for computing."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, lambda: function(*args, **kwargs))

    def close(self) -> None:
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        self._workers.shutdown(wait=False, cancel_futures=True)

    async def _fetch(self, item: MediaItem, tenant: str, slots: asyncio.Semaphore, lease: ByteLease) -> None:
        url = str(item.source)
        if url[:5].lower() == "data:":  # computing, not waiting, and its bytes are paid for with the body
            await self.run(self.pipeline.read, item)
            return
        async with slots:
            with self.pipeline.at(item):
                item.file = data = await self._fly(url, self.pipeline.policy_of(item), tenant)
        lease.take(len(data))

    async def _fly(self, url: str, policy: MediaPolicy, tenant: str) -> bytes:
        """Fetches a URL once for all requests of a tenant that ask for it at the same time."""
        key = (url, policy, tenant)
        flight = self._flights.get(key)
        if flight is None:
            flight = asyncio.get_running_loop().run_in_executor(self._fetchers, fetch, url, policy, tenant)
            self._flights[key] = flight
            flight.add_done_callback(lambda done: self._land(key, done))
        return await asyncio.shield(flight)  # others may wait for it when this client leaves

    def _land(self, key: Flight, flight: asyncio.Future[bytes]) -> None:
        del self._flights[key]
        if not flight.cancelled():
            flight.exception()  # seen, even when nobody waits any more

    async def _preprocess(self, item: MediaItem, tenant: str, lease: ByteLease) -> None:
        # a still picture's pixels are few beside its patches; the frames of a video wait in memory for each other
        held = item.layout.source.width * item.layout.source.height * 3 * item.layout.frames
        lease.take(held)
        try:
            if self._patches.capacity and isinstance(item.file, bytes):
                file = await self.run(_digest, item.file)
                await self._preprocess_once((tenant, file, item.video, item.frames, item.layout), item)
            else:
                await self.run(self.pipeline.preprocess, item)
        finally:
            lease.give(held)

    async def _preprocess_once(self, key: Hashable, item: MediaItem) -> None:
        """Items of one key share one decoding, at the same time or later. A file that fails is tried by each of them,
        so that each is blamed in its own place."""
        patches = self._patches.get(key)
        if patches is None and (decoding := self._decodings.get(key)) is not None:
            with suppress(Exception):
                patches = await asyncio.shield(decoding)
        if patches is not None:
            item.patches, item.layout, item.file = patches, patches.layout, None
        elif key in self._decodings:
            await self.run(self.pipeline.preprocess, item)
        else:
            decoding = self._decodings[key] = asyncio.ensure_future(self.run(self._cut, item))
            decoding.add_done_callback(lambda done: self._keep(key, done))
            await asyncio.shield(decoding)

    def _cut(self, item: MediaItem) -> ImagePatches:
        self.pipeline.preprocess(item)
        return item.patches

    def _keep(self, key: Hashable, decoding: asyncio.Future[ImagePatches]) -> None:
        del self._decodings[key]
        if not decoding.cancelled() and decoding.exception() is None:
            patches = decoding.result()
            self._patches.put(key, patches, patches.pixels.nbytes)


def _digest(file: bytes) -> bytes:
    return hashlib.blake2b(file, digest_size=32).digest()


async def _all(jobs: Iterable[Awaitable[None]]) -> None:
    """Waits for all; raises the first error in order of the jobs, not of time: which one is told must not be luck."""
    for result in await asyncio.gather(*jobs, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
