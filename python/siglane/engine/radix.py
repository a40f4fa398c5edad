"""Prefix reuse: a radix tree over cache ids, one node per full KV page.

A node's key is the page's `page_size` cache ids themselves, so two prompts share a page only when text and images are
equal up to its end: there is no hash to collide, and an image's ids hold its full digest.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from siglane.engine.kv import PageAllocator

PageKey = tuple[int, ...]


@dataclass(slots=True, eq=False)
class Node:
    """One cached page. users: running requests that read it; last_use: logical time, for eviction."""

    page: int
    parent: Node | None
    key: PageKey
    children: dict[PageKey, Node] = field(default_factory=dict)
    users: int = 0
    last_use: int = 0


class NextPage(NamedTuple):
    """Where a prompt leaves the tree: below which node, with which page of ids (None: no full page is left)."""

    parent: Node
    key: PageKey | None


class PrefixCache:
    """Owns the pages of its nodes; frees them to `allocator` on eviction, least recently used leaves first."""

    def __init__(self, allocator: PageAllocator, page_size: int) -> None:
        self.allocator, self.page_size = allocator, page_size
        self._roots: dict[str, Node] = {}
        self._clock = 0
        self._nodes = 0

    @property
    def pages(self) -> int:
        return self._nodes

    def match(self, cache_ids: Sequence[int], salt: str) -> tuple[list[Node], NextPage]:
        """The cached pages that begin `cache_ids`, and where the tree ends.

        The last id is never matched: its logits are what the caller needs.
        """
        node = self._root(salt)
        matched: list[Node] = []
        for key in self._keys(cache_ids[:-1]):
            child = node.children.get(key)
            if child is None:
                return matched, NextPage(node, key)
            matched.append(child)
            node = child
        return matched, NextPage(node, None)

    def lock(self, nodes: Sequence[Node]) -> None:
        """Locked nodes are not evicted. Every lock needs its unlock."""
        self._clock += 1
        for node in nodes:
            node.users += 1
            node.last_use = self._clock

    def unlock(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            node.users -= 1

    def insert(self, cache_ids: Sequence[int], pages: Sequence[int], salt: str, held: Sequence[Node]) -> list[Node]:
        """Offers the full pages of a computed prefix to the tree; `held` are the caller's locked nodes at its start.

        Returns the caller's locked nodes after it: pages that the tree did not know become its property, locked for
        the caller. Where the tree already has an equal page of another request, insertion ends: the caller keeps its
        own pages from there on.
        """
        node = held[-1] if held else self._root(salt)
        self._clock += 1
        nodes = list(held)
        keys = self._keys(cache_ids)
        for key, page in list(zip(keys, pages, strict=False))[len(held) :]:
            if key in node.children:
                break
            child = Node(page, node, key, users=1, last_use=self._clock)
            node.children[key] = child
            self._nodes += 1
            nodes.append(child)
            node = child
        return nodes

    def evict(self, count: int) -> int:
        """Frees up to `count` pages that nobody uses; returns how many."""
        leaves = [(node.last_use, node.page, node) for node in self._walk() if not node.children and not node.users]
        heapq.heapify(leaves)
        freed = 0
        while leaves and freed < count:
            _, page, node = heapq.heappop(leaves)
            parent = node.parent
            assert parent is not None
            del parent.children[node.key]
            self.allocator.give([page])
            self._nodes -= 1
            freed += 1
            if parent.parent is not None and not parent.children and not parent.users:
                heapq.heappush(leaves, (parent.last_use, parent.page, parent))
        return freed

    def evictable(self) -> int:
        """Pages that eviction could free now."""
        return sum(1 for node in self._walk() if node.users == 0)

    def _root(self, salt: str) -> Node:
        if salt not in self._roots:
            self._roots[salt] = Node(-1, None, ())
        return self._roots[salt]

    def _keys(self, cache_ids: Sequence[int]) -> list[PageKey]:
        size = self.page_size
        return [tuple(cache_ids[start : start + size]) for start in range(0, len(cache_ids) - size + 1, size)]

    def _walk(self) -> list[Node]:
        found: list[Node] = []
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            found.append(node)
            stack.extend(node.children.values())
        return found
