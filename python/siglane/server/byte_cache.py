"""What was made last, within a bound."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ByteCache(Generic[K, V]):
    """At most `capacity` bytes, oldest use out first. bytes_of: of a key with its value."""

    def __init__(self, capacity: int, bytes_of: Callable[[K, V], int]) -> None:
        self.capacity = capacity
        self.bytes = 0
        self._bytes_of = bytes_of
        self._values: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: K, value: V) -> None:
        """Keeps `value`, which owns its memory; the first one of a key stays."""
        if key not in self._values:
            self._values[key] = value
            self.bytes += self._bytes_of(key, value)
        while self.bytes > self.capacity:
            self.bytes -= self._bytes_of(*self._values.popitem(last=False))
