"""The cache of encoded images: bounded in bytes, oldest use out first, never the wrong rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from siglane.engine.cache.features import FeatureCache
from siglane.errors import ConfigError
from siglane.families.processor import load_processor
from siglane.settings.engine import EngineConfig
from siglane.weights.demo import opened

ROW_BYTES = 8


def rows(count: int, value: float = 0.0) -> torch.Tensor:
    return torch.full((count, 2), value)


def key(name: int, salt: str = "") -> tuple[str, bytes]:
    return salt, bytes([name])


def test_what_was_put_is_found_again() -> None:
    cache = FeatureCache(1000)
    cache.keep(key(1), rows(3, 7.0))
    found = cache.rows(key(1), 3)
    assert found is not None
    assert torch.equal(found, rows(3, 7.0))
    assert (cache.hits, cache.misses) == (1, 0)


def test_another_length_under_the_same_digest_is_never_used() -> None:
    cache = FeatureCache(1000)
    cache.keep(key(1), rows(3))
    assert cache.rows(key(1), 4) is None
    assert cache.rows(key(1), 2) is None
    assert (cache.hits, cache.misses) == (0, 2)


def test_another_tenants_image_is_never_used() -> None:
    cache = FeatureCache(1000)
    cache.keep(key(1, "a"), rows(3))
    assert cache.rows(key(1, "b"), 3) is None
    assert cache.rows(key(1), 3) is None


def test_the_entry_used_longest_ago_goes_first() -> None:
    cache = FeatureCache(3 * ROW_BYTES)
    for name in (1, 2, 3):
        cache.keep(key(name), rows(1))
    cache.rows(key(1), 1)
    cache.keep(key(4), rows(1))
    assert [name for name in (1, 2, 3, 4) if cache.rows(key(name), 1) is not None] == [1, 3, 4]


def test_an_image_larger_than_the_cache_pushes_nothing_out() -> None:
    cache = FeatureCache(3 * ROW_BYTES)
    cache.keep(key(1), rows(1))
    cache.keep(key(2), rows(4))
    assert cache.rows(key(2), 4) is None
    assert cache.rows(key(1), 1) is not None


def test_an_entry_does_not_keep_the_batch_alive_that_it_was_cut_from() -> None:
    cache = FeatureCache(1000)
    batch = torch.zeros(50, 2)
    cache.keep(key(1), batch[:2])
    batch.fill_(9.0)
    found = cache.rows(key(1), 2)
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
        cache.keep(key(name), rows(count, name))
        found = [cache.rows(key(one), size) for one in range(5) for size in range(1, 7)]
        assert cache.bytes == sum(one.nbytes for one in found if one is not None) <= capacity * ROW_BYTES


def test_a_small_models_cache_is_no_larger_than_what_can_run() -> None:
    small = load_processor(opened("demo")).config.language
    large = replace(small, max_position_embeddings=1 << 20)
    two = EngineConfig(max_running=2)
    tokens = 2 * small.max_position_embeddings
    assert two.feature_bytes(small, torch.float32) == tokens * small.hidden_size * 4
    assert EngineConfig(max_running=64).feature_bytes(small, torch.float32) == 4 * two.feature_bytes(
        small, torch.float32
    )
    assert two.feature_bytes(large, torch.bfloat16) == 256 << 20
    assert EngineConfig(feature_cache_bytes=0).feature_bytes(large, torch.bfloat16) == 0
    with pytest.raises(ConfigError, match="feature_cache_bytes must not be negative"):
        EngineConfig(feature_cache_bytes=-1)
