"""What was used last, within a bound."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ByteCache(Generic[K, V]):
    """At most `capacity` bytes, oldest use out first; what alone is larger is not kept."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.bytes = 0
        self._values: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def __contains__(self, key: K) -> bool:
        return key in self._values

    def get(self, key: K) -> V | None:
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: K, value: V, size: int) -> None:
        """Keeps `value`, which owns its memory of `size` bytes; the first one of a key stays."""
        if key not in self._values and size <= self.capacity:
            self._values[key] = value, size
            self.bytes += size
        while self.bytes > self.capacity:
            _, (_, dropped) = self._values.popitem(last=False)
            self.bytes -= dropped
