"""Pages: handed out once, given back once, in an order that repeats."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siglane.engine.cache.kv import PageAllocator

TOTAL = 6


@given(st.lists(st.tuples(st.booleans(), st.integers(0, TOTAL)), max_size=40))
@settings(deadline=None)
def test_a_page_has_one_owner_and_free_plus_taken_is_total(moves: list[tuple[bool, int]]) -> None:
    allocator = PageAllocator(TOTAL)
    owned: list[list[int]] = []
    for takes, number in moves:
        if takes and number <= allocator.free:
            owned.append(allocator.take(number))
        elif owned:
            allocator.give(owned.pop(number % len(owned)))
        taken = [page for pages in owned for page in pages]
        assert len(set(taken)) == len(taken)
        assert set(taken) <= set(range(TOTAL))
        assert allocator.free + len(taken) == allocator.total == TOTAL


def test_pages_lie_one_after_another() -> None:
    """A sequence grows behind its own pages; a new one leaves room to whoever lies before it."""
    allocator = PageAllocator(16)
    first = allocator.take(2)
    second = allocator.take(2)
    third = allocator.take(1)
    assert (first, second, third) == ([0, 1], [9, 10], [5])
    assert allocator.take(3, after=1) == [2, 3, 4]
    assert allocator.take(1, after=4) == [13]  # the third one is in the way: half of the longest stretch
    allocator.give(second)
    assert allocator.take(3, after=5) == [6, 7, 8]


def test_what_does_not_fit_in_one_stretch_is_divided() -> None:
    allocator = PageAllocator(8)
    pages = allocator.take(8)
    assert pages == [0, 1, 2, 3, 4, 5, 6, 7]
    allocator.give([1, 3, 4, 7])
    assert allocator.take(4) == [3, 4, 1, 7]
    assert allocator.free == 0


def test_more_than_is_free_is_refused_and_nothing_is_taken() -> None:
    allocator = PageAllocator(3)
    allocator.take(1)
    with pytest.raises(RuntimeError, match="3 pages asked for, 2 are free"):
        allocator.take(3)
    assert allocator.free == 2


@pytest.mark.parametrize("page", [0, 2], ids=["given twice", "never taken"])
def test_a_page_that_is_not_taken_cannot_be_given_back(page: int) -> None:
    allocator = PageAllocator(3)
    allocator.give(allocator.take(1))
    with pytest.raises(RuntimeError, match=f"page {page} is given back twice"):
        allocator.give([page])
    assert allocator.free == 3


def test_pages_before_the_first_are_never_handed_out() -> None:
    allocator = PageAllocator(5, first=2)
    assert allocator.take(2) == [2, 3]
    assert (allocator.free, allocator.total) == (3, 5)
    assert allocator.take(3) == [4, 5, 6]
    with pytest.raises(RuntimeError, match="page 1 is given back twice"):
        allocator.give([1])
