"""Prefix reuse: a radix tree over cache ids, one node per full KV page.

A node's key is the tenant's salt and the page's `page_size` cache ids themselves, so two prompts share a page only when
text and images are equal up to its end: there is no hash to collide, and an image's ids hold its full digest.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from siglane.engine.cache.kv import PageAllocator

PageKey = tuple[str | int, ...]


@dataclass(slots=True, eq=False)
class Node:
    """One cached page. users: running requests that read it; last_use: logical time at which the last one left."""

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
    """Owns the pages of its nodes; frees them to `allocator` on eviction, least recently used leaves first.

    Whoever locks a node has locked all nodes above it, so every node without users can be evicted, its children first.
    """

    def __init__(self, allocator: PageAllocator, page_size: int) -> None:
        self.allocator, self.page_size = allocator, page_size
        self._root = Node(-1, None, ())
        self._nodes: dict[int, Node] = {}  # by page
        self._idle: list[tuple[int, int]] = []  # heap of (last use, page): all leaves without users, and outdated ones
        self._clock = 0
        self._locked = 0

    @property
    def pages(self) -> int:
        return len(self._nodes)

    @property
    def evictable(self) -> int:
        """Pages that eviction could free now."""
        return len(self._nodes) - self._locked

    def match(self, cache_ids: Sequence[int], salt: str, before: int | None = None) -> tuple[list[Node], NextPage]:
        """The cached pages that begin `cache_ids`, and where the tree ends.

        before: the first place that is never matched, as its logits are what the caller needs: by default the last.
        """
        node = self._root
        matched: list[Node] = []
        for number in range((len(cache_ids) - 1 if before is None else before) // self.page_size):
            key = self._key(cache_ids, number, salt)
            child = node.children.get(key)
            if child is None:
                return matched, NextPage(node, key)
            matched.append(child)
            node = child
        return matched, NextPage(node, None)

    def lock(self, nodes: Sequence[Node]) -> None:
        """Locked nodes are not evicted. `nodes` begin at the top of the tree; every lock needs its unlock."""
        for node in nodes:
            self._locked += node.users == 0
            node.users += 1

    def unlock(self, nodes: Sequence[Node]) -> None:
        self._clock += 1
        for node in nodes:
            node.users -= 1
            node.last_use = self._clock
            if node.users == 0:
                self._locked -= 1
                self._note_idle(node)

    def insert(
        self, cache_ids: Sequence[int], pages: Sequence[int], salt: str, nodes: list[Node], computed: int
    ) -> None:
        """Offers the full pages of the first `computed` ids to the tree. nodes: the caller's locked ones at their
        start, which are not looked at again, and to which what the tree takes is added.

        Pages that the tree did not know become its property, locked for the caller. Where the tree already has an equal
        page of another request, insertion ends: the caller keeps its own pages from there on.
        """
        node = nodes[-1] if nodes else self._root
        for number in range(len(nodes), computed // self.page_size):
            key = self._key(cache_ids, number, salt)
            if key in node.children:
                break
            child = Node(pages[number], node, key, users=1)
            node.children[key] = self._nodes[child.page] = child
            self._locked += 1
            nodes.append(child)
            node = child

    def evict(self, count: int) -> int:
        """Frees up to `count` pages that nobody uses; returns how many."""
        freed = 0
        while freed < count and self._idle:
            last_use, page = heapq.heappop(self._idle)
            node = self._nodes.get(page)
            if node is None or node.last_use != last_use or node.users or node.children:
                continue  # outdated: used again since
            assert node.parent is not None
            del node.parent.children[node.key], self._nodes[page]
            self.allocator.give([page])
            freed += 1
            self._note_idle(node.parent)
        return freed

    def _note_idle(self, node: Node) -> None:
        """Remembers a node as the next to evict if it is a leaf without users."""
        if node.users or node.children or node is self._root:
            return
        heapq.heappush(self._idle, (node.last_use, node.page))
        if len(self._idle) > 2 * len(self._nodes) + 64:  # mostly outdated: a prompt that is asked again and again
            leaves = (one for one in self._nodes.values() if not one.users and not one.children)
            self._idle = [(leaf.last_use, leaf.page) for leaf in leaves]
            heapq.heapify(self._idle)

    def _key(self, cache_ids: Sequence[int], number: int, salt: str) -> PageKey:
        return (salt, *cache_ids[number * self.page_size : (number + 1) * self.page_size])
