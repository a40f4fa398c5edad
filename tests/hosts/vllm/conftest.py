"""Tests that ask the real vLLM; they skip until `make test-vllm` has built its environment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_host import READY, Imported, vllm_imported

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="vLLM has an environment of its own: make test-vllm builds it")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("vllm")
            if not READY.exists():
                item.add_marker(skip)


@pytest.fixture(scope="session")
def imported() -> Iterator[Imported]:
    """For servers of tests that need many starts."""
    with vllm_imported() as found:
        yield found
