"""The paged key/value cache: tensors cut into pages, and who owns which page."""

from __future__ import annotations

import math
from collections import deque

import torch

from siglane.config.language import LanguageConfig
from siglane.errors import UserError


class PagedKV:
    """keys and values: `[layers, pages, page_size, kv_heads, head_dim]`. Which token lies where is told per step.

    UserError when this device has not so much memory.
    """

    def __init__(
        self,
        language: LanguageConfig,
        kv_heads: int,
        *,
        pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (language.num_hidden_layers, pages, page_size, kv_heads, language.head_dim)
        try:
            self.keys = torch.zeros(shape, dtype=dtype, device=device)
            self.values = torch.zeros(shape, dtype=dtype, device=device)
        except RuntimeError as error:  # what torch's allocators raise, with lines about themselves
            size = 2 * math.prod(shape) * dtype.itemsize
            message = f"a KV cache of {pages * page_size} tokens takes {size / 1e9:.1f} GB, more than {device} gives; "
            raise UserError(message + "lower kv_tokens", code="kv_cache_too_large", param="kv_tokens") from error
        self.page_size = page_size


class PageAllocator:
    """Hands out page numbers, oldest free page first, so that runs are reproducible."""

    def __init__(self, pages: int) -> None:
        self.total = pages
        self._free = deque(range(pages))
        self._taken: set[int] = set()

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` pages. The caller has checked `free`."""
        if count > len(self._free):
            raise RuntimeError(f"{count} pages asked for, {len(self._free)} are free")
        pages = [self._free.popleft() for _ in range(count)]
        self._taken.update(pages)
        return pages

    def give(self, pages: list[int]) -> None:
        """Returns pages. RuntimeError when one is not taken: freeing twice would hand one page to two requests."""
        for page in pages:
            if page not in self._taken:
                raise RuntimeError(f"page {page} is given back twice")
            self._taken.remove(page)
            self._free.append(page)
