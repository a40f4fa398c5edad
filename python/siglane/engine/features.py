"""Encoded images by digest: an image seen before, in any request of the same tenant, is not encoded again."""

from __future__ import annotations

from collections import OrderedDict

import torch

FeatureKey = tuple[str, bytes]  # the tenant's salt, the image's digest


class FeatureCache:
    """key -> projected rows `[count, hidden_size]`; at most `capacity` bytes, oldest use out first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self._rows: OrderedDict[FeatureKey, torch.Tensor] = OrderedDict()

    def get(self, key: FeatureKey, count: int) -> torch.Tensor | None:
        """The rows of the image with this key. An entry of another length is not used, whatever its digest says."""
        rows = self._rows.get(key)
        if rows is None or rows.shape[0] != count:
            self.misses += 1
            return None
        self._rows.move_to_end(key)
        self.hits += 1
        return rows

    def put(self, key: FeatureKey, rows: torch.Tensor) -> None:
        """Keeps `rows` (its own memory, not a view of a batch) unless it alone exceeds the capacity."""
        if rows.nbytes > self.capacity or key in self._rows:
            return
        self._rows[key] = rows.clone()
        self.bytes += rows.nbytes
        while self.bytes > self.capacity:
            _, dropped = self._rows.popitem(last=False)
            self.bytes -= dropped.nbytes
