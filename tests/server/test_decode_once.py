"""Equal files of requests are decoded once: at the same time, one after the other, and never across tenants."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch
from prometheus_client import Gauge
from serving import config_of, data_url, picture
from waiting import PATIENCE

from siglane.errors import ImageError, UserError
from siglane.families.pipeline import MediaPipeline
from siglane.families.processor import Processor
from siglane.media.item import MediaItem
from siglane.server.context import ByteLease, InflightBytes
from siglane.server.media import MediaLoader
from siglane.tiling.rule import CHECKPOINT_LIMITS, ImageBudget
from siglane.types import ImagePatches
from siglane.types.byte_cache import ByteCache

A, B, BROKEN = picture(50, 40, seed=1), picture(50, 40, seed=2), picture(50, 40, seed=3)[:-400]
LOW = ImageBudget(detail="low")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The files that are decoded, in order."""
    found: list[bytes] = []
    decode, lock = MediaPipeline.decode, threading.Lock()

    def noted(self: MediaPipeline, item: MediaItem) -> Any:
        with lock:
            assert isinstance(item.file, bytes)
            found.append(item.file)
        return decode(self, item)

    monkeypatch.setattr(MediaPipeline, "decode", noted)
    return found


def item(file: bytes, param: str = "x", limits: ImageBudget = CHECKPOINT_LIMITS) -> MediaItem:
    return MediaItem(data_url(file), param, limits)


def loaded(processor: Processor, use: Callable[[Callable[..., Awaitable[MediaItem]]], Awaitable[Any]], **options: Any):
    """Runs `use` with a function that takes an item through all stages."""
    loader = MediaLoader(config_of(**options), processor.config.images, CHECKPOINT_LIMITS)
    inflight = InflightBytes(1 << 30, Gauge("x", "x", registry=None))

    async def load(one: MediaItem, tenant: str = "") -> MediaItem:
        lease = ByteLease(inflight)
        loader.admit([one])
        await loader.fetch([one], tenant, lease)
        await loader.lay_out([one])
        await loader.preprocess([one], tenant, lease)
        lease.close()
        return one

    try:
        return asyncio.run(use(load))
    finally:
        loader.close()
        assert inflight.used == 0


def test_equal_files_are_decoded_once(processor: Processor, decoded: list[bytes]) -> None:
    async def use(load: Any) -> list[MediaItem]:
        together = await asyncio.gather(*(load(item(file)) for file in (A, B, A, A, B)))
        return [*together, await load(item(A))]

    found = loaded(processor, use)
    assert sorted(decoded) == sorted((A, B))
    assert all(one.file is None for one in found)
    (alone,) = [loaded(processor, lambda load: load(item(A)), patch_cache_bytes=0)]
    for one in (found[0], found[2], found[5]):
        assert one.patches.digest == alone.patches.digest
        assert torch.equal(one.patches.pixels, alone.patches.pixels)
    assert found[1].patches.digest != alone.patches.digest


def test_what_is_told_apart(processor: Processor, decoded: list[bytes]) -> None:
    """Another tenant must not learn from the time it takes what others have shown; other limits, other patches."""

    async def use(load: Any) -> None:
        first = await load(item(A), "one")
        await load(item(A), "two")
        assert decoded == [A, A]
        low = await load(item(A, limits=LOW), "one")
        assert low.layout != first.layout
        assert low.patches.layout == low.layout
        assert decoded == [A, A, A]

    loaded(processor, use)


def test_a_file_that_fails_is_blamed_in_each_place(processor: Processor, decoded: list[bytes]) -> None:
    async def use(load: Any) -> list[Any]:
        jobs = [load(item(file, f"messages[{number}]")) for number, file in enumerate((BROKEN, A, BROKEN, BROKEN))]
        return [*(await asyncio.gather(*jobs, return_exceptions=True))]

    first, good, *others = loaded(processor, use)
    assert isinstance(good, MediaItem)
    for number, error in ((0, first), (2, others[0]), (3, others[1])):
        assert isinstance(error, ImageError)
        assert (error.code, error.param) == ("image_decode_failed", f"messages[{number}]")


def test_one_who_leaves_does_not_take_the_decoding_with_him(
    processor: Processor, decoded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    decode = MediaPipeline.decode

    def slow(self: MediaPipeline, one: MediaItem) -> Any:
        begun.set()
        go_on.wait(PATIENCE)
        return decode(self, one)

    monkeypatch.setattr(MediaPipeline, "decode", slow)

    async def use(load: Any) -> MediaItem:
        first = asyncio.create_task(load(item(A)))
        await asyncio.to_thread(begun.wait, PATIENCE)
        second = asyncio.create_task(load(item(A)))
        await asyncio.sleep(0.05)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        go_on.set()
        return await second

    loaded(processor, use)
    assert decoded == [A]


def test_what_is_kept_is_bounded(processor: Processor, decoded: list[bytes]) -> None:
    async def use(load: Any) -> None:
        for file in (A, B, A, A):
            await load(item(file))

    loaded(processor, use, patch_cache_bytes=0)
    assert decoded == [A, B, A, A]
    decoded.clear()
    size = loaded(processor, lambda load: load(item(A))).patches.pixels.nbytes
    decoded.clear()
    loaded(processor, use, patch_cache_bytes=size)
    assert decoded == [A, B, A]
    with pytest.raises(UserError, match="patch_cache_bytes must be at least 0"):
        config_of(patch_cache_bytes=-1)


def test_the_oldest_use_goes_first(processor: Processor) -> None:
    patches: ImagePatches = loaded(processor, lambda load: load(item(A))).patches
    cache = ByteCache[str, ImagePatches](2 * patches.pixels.nbytes)
    for key in "ab":
        cache.put(key, patches, patches.pixels.nbytes)
    assert cache.get("a") is patches
    cache.put("c", patches, patches.pixels.nbytes)
    assert [cache.get(key) is not None for key in "abc"] == [True, False, True]
    assert cache.bytes == 2 * patches.pixels.nbytes
    cache.capacity = 0
    cache.put("d", patches, patches.pixels.nbytes)
    assert cache.bytes == 0
