"""Tests in the real SGLang; they run in the environment of `make test-sglang` and skip in any other."""

from __future__ import annotations

from importlib.metadata import distributions
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    installed = any(distributions(name="sglang"))
    skip = pytest.mark.skip(reason="sglang is not installed here: run `make test-sglang`")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("sglang")
            if not installed:
                item.add_marker(skip)
