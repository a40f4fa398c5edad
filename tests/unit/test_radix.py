"""The prefix tree: pages are shared only between equal beginnings, never lost, and evicted oldest use first."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from engine_kit import image, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from siglane.engine.cache.kv import PageAllocator
from siglane.engine.cache.prefix import Node, PrefixCache

PAGES, PAGE_SIZE = 10, 2
FEW_IDS = st.lists(st.integers(0, 1), min_size=1, max_size=9)  # so that beginnings are often equal
SALTS = st.sampled_from(["", "tenant"])


@dataclass(eq=False)
class Reader:
    """A request as the scheduler keeps it."""

    ids: list[int]
    salt: str
    pages: list[int]
    nodes: list[Node]
    computed: int


class TreeMachine(RuleBasedStateMachine):
    """Requests match, compute, insert and leave in any order, with evictions in between.

    `memory` is what the pages hold: for each, the tenant and the ids from the prompt's start to the page's end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(PAGES)
        self.tree = PrefixCache(self.allocator, PAGE_SIZE)
        self.readers: list[Reader] = []
        self.memory: dict[int, tuple[str, tuple[int, ...]]] = {}

    @rule(ids=FEW_IDS, salt=SALTS)
    def start(self, ids: list[int], salt: str) -> None:
        nodes, following = self.tree.match(ids, salt)
        covered = len(nodes) * PAGE_SIZE
        assert covered < len(ids), "the last id must stay to be computed"
        for number, node in enumerate(nodes, start=1):
            assert self.memory[node.page] == (salt, tuple(ids[: number * PAGE_SIZE]))
        fits = covered + PAGE_SIZE < len(ids)
        assert following.key == ((salt, *ids[covered : covered + PAGE_SIZE]) if fits else None)
        self.tree.lock(nodes)
        needed = -(-len(ids) // PAGE_SIZE) - len(nodes)
        self.tree.evict(max(0, needed - self.allocator.free))
        if needed > self.allocator.free:
            self.tree.unlock(nodes)
            return
        pages = [node.page for node in nodes] + self.allocator.take(needed)
        self.readers.append(Reader(ids, salt, pages, nodes, covered))

    @precondition(lambda self: self.readers)
    @rule(which=st.integers(0, 9), count=st.integers(1, 9))
    def compute(self, which: int, count: int) -> None:
        one = self.readers[which % len(self.readers)]
        one.computed = min(len(one.ids), one.computed + count)
        for number in range(len(one.nodes), one.computed // PAGE_SIZE):
            self.memory[one.pages[number]] = (one.salt, tuple(one.ids[: (number + 1) * PAGE_SIZE]))
        self.tree.insert(one.ids, one.pages, one.salt, one.nodes, one.computed)
        assert [node.page for node in one.nodes] == one.pages[: len(one.nodes)]

    @precondition(lambda self: self.readers)
    @rule(which=st.integers(0, 9))
    def leave(self, which: int) -> None:
        """Finished, aborted or preempted: it is all the same to the tree."""
        one = self.readers.pop(which % len(self.readers))
        self.allocator.give(one.pages[len(one.nodes) :])
        self.tree.unlock(one.nodes)

    @rule(count=st.integers(1, PAGES))
    def evict(self, count: int) -> None:
        expected, before = min(count, self.tree.evictable), self.allocator.free
        assert self.tree.evict(count) == expected
        assert self.allocator.free == before + expected

    @invariant()
    def pages_are_free_or_owned_or_cached(self) -> None:
        own = [page for one in self.readers for page in one.pages[len(one.nodes) :]]
        assert len(set(own)) == len(own)
        assert self.allocator.free + len(own) + self.tree.pages == PAGES

    @invariant()
    def a_reader_finds_in_its_pages_what_it_computed(self) -> None:
        for one in self.readers:
            for number in range(one.computed // PAGE_SIZE):
                assert self.memory[one.pages[number]] == (one.salt, tuple(one.ids[: (number + 1) * PAGE_SIZE]))

    @invariant()
    def what_nobody_reads_can_be_evicted(self) -> None:
        read = {node.page for one in self.readers for node in one.nodes}
        assert self.tree.evictable == self.tree.pages - len(read)

    def teardown(self) -> None:
        while self.readers:
            self.leave(0)
        self.tree.evict(PAGES)
        assert self.tree.pages == 0
        assert self.allocator.free == PAGES


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


class Tree:
    """A tree of pages of two, to which whole prompts are added."""

    def __init__(self, pages: int = 16) -> None:
        self.allocator = PageAllocator(pages)
        self.cache = PrefixCache(self.allocator, 2)

    def read(self, *ids: int, salt: str = "") -> list[Node]:
        """Computes a prompt as far as it is not known and keeps it locked."""
        nodes, _ = self.cache.match([*ids, -1], salt)
        self.cache.lock(nodes)
        pages = [node.page for node in nodes]
        pages += self.allocator.take(len(ids) // 2 - len(nodes))
        self.cache.insert(ids, pages, salt, nodes, len(ids))
        return nodes

    def add(self, *ids: int, salt: str = "") -> None:
        self.cache.unlock(self.read(*ids, salt=salt))

    def known(self, *ids: int, salt: str = "") -> int:
        """How many of `ids` the tree holds."""
        return len(self.cache.match([*ids, -1], salt)[0]) * 2


def test_the_last_token_is_never_matched() -> None:
    tree = Tree()
    tree.add(1, 2, 3, 4)
    assert len(tree.cache.match([1, 2, 3, 4], "")[0]) == 1
    assert len(tree.cache.match([1, 2, 3, 4, 5], "")[0]) == 2
    assert tree.cache.match([1], "")[0] == []


def test_tenants_never_share_a_page() -> None:
    tree = Tree()
    tree.add(1, 2, salt="a")
    assert tree.known(1, 2, salt="a") == 2
    assert tree.known(1, 2, salt="b") == tree.known(1, 2) == 0


def test_salts_that_come_and_go_leave_nothing_behind() -> None:
    tree = Tree(pages=2)
    for number in range(100):
        tree.cache.evict(1)
        tree.add(1, 2, salt=str(number))
    assert tree.cache.pages == 1
    assert len(tree.cache._root.children) == 1


@given(start=st.integers(0, 5), rows=st.integers(1, 5), tail=st.integers(0, 5), page_size=st.integers(1, 4))
@settings(deadline=None)
def test_equal_text_with_another_image_shares_only_what_comes_before_the_image(
    start: int, rows: int, tail: int, page_size: int
) -> None:
    def ask(name: int) -> tuple[int, ...]:
        return prompt(*range(start), image(name, rows=rows), *range(tail), 7).cache_ids()

    allocator = PageAllocator(32)
    tree = PrefixCache(allocator, page_size)
    ids = ask(1)
    tree.insert(ids, allocator.take(len(ids) // page_size), "", [], len(ids))
    same, other = tree.match(ask(1), "")[0], tree.match(ask(2), "")[0]
    assert len(same) == (len(ids) - 1) // page_size
    assert len(other) == start // page_size


def test_eviction_takes_the_leaf_that_was_left_longest_ago() -> None:
    tree = Tree()
    tree.add(1, 1)
    tree.add(2, 2)
    tree.add(3, 3)
    tree.add(1, 1)  # used again
    assert tree.cache.evict(1) == 1
    assert (tree.known(1, 1), tree.known(2, 2), tree.known(3, 3)) == (2, 0, 2)
    assert tree.cache.evict(1) == 1
    assert (tree.known(1, 1), tree.known(3, 3)) == (2, 0)


def test_use_lasts_until_the_reader_leaves() -> None:
    tree = Tree()
    early = tree.read(1, 1)
    tree.add(2, 2)
    tree.cache.unlock(early)
    tree.cache.evict(1)
    assert (tree.known(1, 1), tree.known(2, 2)) == (2, 0)


def test_a_prompt_is_evicted_from_its_end() -> None:
    tree = Tree()
    tree.add(1, 1, 2, 2, 3, 3)
    for left in (4, 2, 0):
        assert tree.cache.evict(1) == 1
        assert tree.known(1, 1, 2, 2, 3, 3) == left


def test_what_somebody_reads_stays() -> None:
    tree = Tree()
    tree.add(1, 1, 2, 2, 3, 3)
    held, _ = tree.cache.match([1, 1, 2, 2, 0], "")
    tree.cache.lock(held)
    assert tree.cache.evictable == 1
    assert tree.cache.evict(3) == 1
    assert tree.known(1, 1, 2, 2, 3, 3) == 4
    tree.cache.unlock(held)
    assert tree.cache.evict(3) == 2


@pytest.mark.parametrize("times", [2, 5])
def test_a_page_computed_twice_stays_with_its_second_computer(times: int) -> None:
    tree = Tree()
    tree.read(1, 1)
    for _ in range(times):
        pages = tree.allocator.take(1)
        nodes: list[Node] = []
        tree.cache.insert([1, 1], pages, "", nodes, 2)
        assert nodes == []
        tree.allocator.give(pages)  # not the tree's
    assert tree.cache.pages == 1


def test_a_prompt_asked_again_and_again_does_not_make_the_tree_grow() -> None:
    tree = Tree()
    for _ in range(1000):
        tree.add(1, 1, 2, 2)
    assert tree.cache.pages == 2
    assert len(tree.cache._idle) < 100
    assert tree.cache.evict(4) == 2
