"""Encoded images by digest: an image seen before, in any request of the same tenant, is not encoded again."""

from __future__ import annotations

import torch

from siglane.types.byte_cache import ByteCache

FeatureKey = tuple[str, bytes]  # the tenant's salt, the image's digest


class FeatureCache(ByteCache[FeatureKey, torch.Tensor]):
    """key -> projected rows `[count, hidden_size]`."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.hits = 0
        self.misses = 0

    def rows(self, key: FeatureKey, count: int) -> torch.Tensor | None:
        """Of the image with this key. An entry of another length is not used, whatever its digest says."""
        rows = self.get(key)
        if rows is None or rows.shape[0] != count:
            self.misses += 1
            return None
        self.hits += 1
        return rows

    def keep(self, key: FeatureKey, rows: torch.Tensor) -> None:
        """Keeps a copy of `rows`, which may be a view of a batch."""
        if key not in self and rows.nbytes <= self.capacity:
            self.put(key, rows.clone(), rows.nbytes)
