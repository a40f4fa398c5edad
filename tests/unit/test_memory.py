"""What the KV cache of a GPU gets: arithmetic on what the driver and a measured step say."""

from __future__ import annotations

import pytest
import torch
from test_paged_attention import KV_HEADS, language

from siglane.engine.memory import GRAPH_BYTES, plan_memory
from siglane.errors import UserError
from siglane.settings.engine import EngineConfig

GIGA = 10**9
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _card(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 GB, 60 of them free, 12 of those taken held by torch: 8 are others'."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60 * GIGA, 80 * GIGA))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 12 * GIGA)


def test_the_cache_gets_what_the_largest_step_leaves() -> None:
    plan = plan_memory(CUDA, 20 * GIGA, 1 * GIGA)
    assert (plan.total, plan.others, plan.peak) == (80 * GIGA, 8 * GIGA, 20 * GIGA)
    assert plan.kv == 72 * GIGA - 8 * GIGA - 20 * GIGA - 1 * GIGA - GRAPH_BYTES


def test_a_card_without_room_is_refused_in_one_line_that_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"80.0 GB, 72.0 of them are needed .* lower max_batch_tokens") as caught:
        plan_memory(CUDA, 64 * GIGA, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("available", "pages"), [(0, 1), (1 << 17, 64), (1 << 40, 2 * 63)])
def test_pages_are_those_that_fit_and_no_more_than_can_be_filled(available: int, pages: int) -> None:
    config = EngineConfig(device="cpu", max_running=2)  # of a context of 999 tokens
    assert config.pages_within(available, language(), KV_HEADS, torch.float32) == pages
