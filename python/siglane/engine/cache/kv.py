"""The paged key/value cache: tensors cut into pages, and who owns which page."""

from __future__ import annotations

import math
import re

import torch

from siglane.config.language import LanguageConfig
from siglane.errors import UserError
from siglane.nn.cpu.memory import in_large_pages
from siglane.nn.device import short_of_memory

FREE = re.compile(rb"\x00+")
SCRATCH_PAGES = 1  # the first: what padding writes and reads, never a sequence's


class PagedKV:
    """keys and values: `[layers, SCRATCH_PAGES + pages, page_size, kv_heads, head_dim]`. Which token lies where is told
    per step. tokens: that sequences can hold.

    slots: keys and values of each layer, `[slots, kv_heads, head_dim]`; all_by_head: of all layers,
    `[layers, 1, kv_heads, slots, head_dim]`. UserError when this device has not so much memory.
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
        shape = (language.num_hidden_layers, SCRATCH_PAGES + pages, page_size, kv_heads, language.head_dim)
        tokens, size = pages * page_size, 2 * math.prod(shape) * dtype.itemsize
        message = f"a KV cache of {tokens} tokens takes {size / 1e9:.1f} GB, more than {device} gives; lower kv_tokens"
        shortage = UserError(message, code="kv_cache_too_large", param="kv_tokens")
        with short_of_memory(size, device, shortage):
            self.keys = torch.zeros(shape, dtype=dtype, device=device)
            self.values = torch.zeros(shape, dtype=dtype, device=device)
        if device.type == "cpu":
            for cache in (self.keys, self.values):
                in_large_pages(cache, filled=False)
        self.slots = tuple((k.flatten(0, 1), v.flatten(0, 1)) for k, v in zip(self.keys, self.values, strict=True))
        self.all_by_head = tuple(x.flatten(1, 2).transpose(1, 2)[:, None] for x in (self.keys, self.values))
        self.page_size, self.tokens = page_size, tokens

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.keys[:, 0, 0].nbytes


class PageAllocator:
    """Hands out the `pages` page numbers from `first` on, in an order that repeats; a sequence's pages lie one after
    another where they can.

    A sequence grows into the pages behind its own; a new one begins in the middle of the longest free stretch, which
    leaves its half to whoever lies before it.
    """

    def __init__(self, pages: int, first: int = 0) -> None:
        self.total = self.free = pages
        self._first = first
        self._taken = bytearray([1] * first + [0] * pages)

    def take(self, count: int, after: int | None = None) -> list[int]:
        """`count` pages, those behind page `after` if they are free. The caller has checked `free`."""
        if count > self.free:
            raise RuntimeError(f"{count} pages asked for, {self.free} are free")
        pages: list[int] = []
        if after is not None:
            pages = self._mark(after + 1, count)
        if len(pages) == count:
            return pages
        stretches = sorted((found.span() for found in FREE.finditer(self._taken)), key=_length, reverse=True)
        start, stop = stretches[0]
        middle = (start + stop) // 2
        if start > self._first and not pages and stop - middle >= count:
            return self._mark(middle, count)
        for start, _ in stretches:
            pages += self._mark(start, count - len(pages))
        return pages

    def give(self, pages: list[int]) -> None:
        """Returns pages. RuntimeError when one is not taken: freeing twice would hand one page to two requests."""
        for page in pages:
            if page < self._first or not self._taken[page]:
                raise RuntimeError(f"page {page} is given back twice")
            self._taken[page] = 0
            self.free += 1

    def _mark(self, start: int, count: int) -> list[int]:
        """Takes up to `count` free pages from `start` on, one after another."""
        pages = []
        for page in range(start, min(start + count, len(self._taken))):
            if self._taken[page]:
                break
            self._taken[page] = 1
            pages.append(page)
        self.free -= len(pages)
        return pages


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]
