"""Whose requests a server takes, and how much of it each API key may have. Lives on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from hashlib import sha256

from siglane.server.errors import RateLimited
from siglane.settings.keys import ApiKey, KeyLimits, read_keys
from siglane.settings.server import ServerConfig

MINUTE = 60.0
NO_LIMITS = KeyLimits()


class Bucket:
    """So much of something a minute, refilled evenly; None: without end. What is larger than the rest is taken all the
    same and leaves a debt, so that nothing is too large for ever."""

    def __init__(self, per_minute: int | None, now: Callable[[], float] = time.monotonic) -> None:
        self._capacity, self._now = per_minute, now
        self._level, self._at = float(per_minute or 0), now()

    def wait(self, keep: float = 0.0) -> float:
        """Seconds until there is one more than `keep` of a whole minute's."""
        if self._capacity is None:
            return 0.0
        least = min(1 + keep * self._capacity, self._capacity)
        return max(0.0, (least - self._filled()) * MINUTE / self._capacity)

    def take(self, count: int) -> None:
        if self._capacity is not None:
            self._level = self._filled() - count

    def _filled(self) -> float:
        assert self._capacity is not None
        now = self._now()
        self._level = min(self._capacity, self._level + (now - self._at) * self._capacity / MINUTE)
        self._at = now
        return self._level


class Client:
    """Whoever comes with one key; everybody where no key is asked for.

    owner: what stands for the key where files and batches are kept; name: in logs and metrics, "" for everybody.
    """

    def __init__(self, owner: str = "", name: str = "", salt: str = "", limits: KeyLimits = NO_LIMITS) -> None:
        self.owner, self.name, self.limits, self._salt = owner, name, limits, salt
        self._requests, self._patches = Bucket(limits.requests_per_minute), Bucket(limits.patches_per_minute)
        self._active = 0
        # rows of batches have places of their own: they wait for them, and take none of the client's
        self.batch_places: AbstractAsyncContextManager[object] = (
            nullcontext() if limits.concurrency is None else asyncio.Semaphore(limits.concurrency)
        )

    def salt(self, own: str | None) -> str:
        """What separates a request in the caches: the key's, which has no NUL, and within it the request's own."""
        return f"{self._salt}\0{own or ''}" if self.owner else own or ""

    def check(self) -> None:
        """Raises RateLimited when no further request may begin."""
        if (seconds := self._requests.wait()) > 0:
            raise RateLimited(f"this key has {self.limits.requests_per_minute} requests a minute", seconds)
        if self.limits.concurrency is not None and self._active >= self.limits.concurrency:
            raise RateLimited(f"this key has {self.limits.concurrency} requests at a time", 1)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """As long as a request is answered."""
        self.check()
        self._requests.take(1)
        self._active += 1
        try:
            yield
        finally:
            self._active -= 1

    def take_row(self) -> None:
        """For a row of a batch, which leaves half of each minute to those who wait for their answers."""
        if (seconds := self._requests.wait(keep=0.5)) > 0:
            raise RateLimited("the batches of this key have used their half of the requests a minute", seconds)
        self._requests.take(1)

    def take_patches(self, count: int, batch: bool) -> None:
        """Raises RateLimited when the last requests took too many. Call it before any pixel is decoded."""
        if count and (seconds := self._patches.wait(keep=0.5 if batch else 0.0)) > 0:
            raise RateLimited(f"this key has {self.limits.patches_per_minute} image patches a minute", seconds)
        self._patches.take(count)


class Clients:
    """All that a server knows. UserError as `read_keys`."""

    def __init__(self, config: ServerConfig) -> None:
        keys = [] if config.api_key is None else [ApiKey(key=config.api_key, cache_salt="")]
        keys += [] if config.api_keys is None else read_keys(config.api_keys)
        self.by_key: Mapping[str, Client] = {key.key: _client(key) for key in keys}
        self.everybody = Client()
        self._by_owner = {client.owner: client for client in self.by_key.values() or (self.everybody,)}

    def of_owner(self, owner: str) -> Client | None:
        """Who has a batch. None where the server takes their requests no more: their key is gone, or there were none
        and now one is needed."""
        return self._by_owner.get(owner)


def _client(key: ApiKey) -> Client:
    owner = owner_of(key.key)
    return Client(owner, key.name or owner[:8], owner if key.cache_salt is None else key.cache_salt, key)


def owner_of(key: str) -> str:
    """What stands for a key where files and batches are kept; the key cannot be read from it."""
    return sha256(f"siglane owner {key}".encode()).hexdigest()
