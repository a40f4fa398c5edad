"""Pages: handed out once, given back once, in an order that repeats."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siglane.engine.kv import PageAllocator

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


def test_the_page_that_has_been_free_longest_is_handed_out_first() -> None:
    allocator = PageAllocator(4)
    assert allocator.take(3) == [0, 1, 2]
    allocator.give([1])
    allocator.give([0])
    assert allocator.take(3) == [3, 1, 0]


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
