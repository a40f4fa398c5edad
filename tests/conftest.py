"""Before any test: tiny models are fastest on one thread, above all where several test runs share a machine, and no
option comes from the environment of whoever runs the tests."""

from __future__ import annotations

import gc
import logging
import os
import re
import time
from collections.abc import Generator
from pathlib import Path

import pytest

for _name in [name for name in os.environ if name.startswith("SIGLANE_")]:
    del os.environ[_name]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What a hundred files import stays to the end: no collector looks for garbage in it, now or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test's many cases that check the same, those that `few` names (* stands for anything) run in `make test`;
    the others are slow."""
    named, found = set[tuple[str, str]](), set[tuple[str, str]]()
    for item in items:
        if (mark := item.get_closest_marker("few")) is None:
            continue
        test, _, case = item.nodeid.removesuffix("]").partition("[")
        matching = {name for name in mark.args if re.fullmatch(re.escape(name).replace(r"\*", ".*"), case)}
        named |= {(test, name) for name in mark.args}
        found |= {(test, name) for name in matching}
        if not matching:
            item.add_marker(pytest.mark.slow)
    if named - found and not any("::" in given for given in config.args):
        raise pytest.UsageError(f"few names cases that do not exist: {sorted(named - found)}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """`.ci/run` has a limit of its own: on a slow machine a test that would begin later says that it was left out."""
    if time.time() > float(os.environ.get("TESTS_UNTIL", "inf")):
        pytest.skip("no time was left for it on this machine (TESTS_UNTIL)")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch  # not above: whoever only hands tests out to workers does without

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def nvila_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An NVILA-Lite checkpoint that many tests read and none writes to."""
    from checkpoints import write_nvila_checkpoint  # transformers' models, which not every test needs

    folder = tmp_path_factory.mktemp("nvila") / "tiny"
    write_nvila_checkpoint(folder)
    return folder


@pytest.fixture(autouse=True)
def _loggers() -> None:
    """What serves in this process, for a test or for many, sets up logging; every test finds it as it was at first."""
    for name in ("siglane", "uvicorn", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.NOTSET)
