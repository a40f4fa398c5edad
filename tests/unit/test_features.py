"""The cache of encoded images: bounded in bytes, oldest use out first, never the wrong rows."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from siglane.engine.features import FeatureCache

ROW_BYTES = 8


def rows(count: int, value: float = 0.0) -> torch.Tensor:
    return torch.full((count, 2), value)


def key(name: int, salt: str = "") -> tuple[str, bytes]:
    return salt, bytes([name])


def test_what_was_put_is_found_again() -> None:
    cache = FeatureCache(1000)
    cache.put(key(1), rows(3, 7.0))
    found = cache.get(key(1), 3)
    assert found is not None
    assert torch.equal(found, rows(3, 7.0))
    assert (cache.hits, cache.misses) == (1, 0)


def test_another_length_under_the_same_digest_is_never_used() -> None:
    cache = FeatureCache(1000)
    cache.put(key(1), rows(3))
    assert cache.get(key(1), 4) is None
    assert cache.get(key(1), 2) is None
    assert (cache.hits, cache.misses) == (0, 2)


def test_another_tenants_image_is_never_used() -> None:
    cache = FeatureCache(1000)
    cache.put(key(1, "a"), rows(3))
    assert cache.get(key(1, "b"), 3) is None
    assert cache.get(key(1), 3) is None


def test_the_entry_used_longest_ago_goes_first() -> None:
    cache = FeatureCache(3 * ROW_BYTES)
    for name in (1, 2, 3):
        cache.put(key(name), rows(1))
    cache.get(key(1), 1)
    cache.put(key(4), rows(1))
    assert [name for name in (1, 2, 3, 4) if cache.get(key(name), 1) is not None] == [1, 3, 4]


def test_an_image_larger_than_the_cache_pushes_nothing_out() -> None:
    cache = FeatureCache(3 * ROW_BYTES)
    cache.put(key(1), rows(1))
    cache.put(key(2), rows(4))
    assert cache.get(key(2), 4) is None
    assert cache.get(key(1), 1) is not None


def test_an_entry_does_not_keep_the_batch_alive_that_it_was_cut_from() -> None:
    cache = FeatureCache(1000)
    batch = torch.zeros(50, 2)
    cache.put(key(1), batch[:2])
    batch.fill_(9.0)
    found = cache.get(key(1), 2)
    assert found is not None
    assert torch.equal(found, rows(2))
    assert found.untyped_storage().nbytes() == 2 * ROW_BYTES


@given(
    capacity=st.integers(0, 20),
    puts=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6)), max_size=30),
)
@settings(deadline=None)
def test_it_never_holds_more_than_its_capacity_and_counts_exactly(capacity: int, puts: list[tuple[int, int]]) -> None:
    cache = FeatureCache(capacity * ROW_BYTES)
    for name, count in puts:
        cache.put(key(name), rows(count, name))
        found = [cache.get(key(one), size) for one in range(5) for size in range(1, 7)]
        assert cache.bytes == sum(one.nbytes for one in found if one is not None) <= capacity * ROW_BYTES
