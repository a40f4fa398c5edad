"""An engine in the caller's own process that hangs: an error instead of waiting for ever."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import eventually

from siglane.errors import EngineError
from siglane.llm.offline import LLM
from siglane.lm.qwen import DecoderBlock
from siglane.types import SamplingParams

LIMIT = 1.5  # seconds, of an engine whose forwards take longer in all
FIVE = SamplingParams(max_tokens=5, ignore_eos=True)


def load(folder: Path, engine_timeout: float) -> LLM:
    return LLM(folder, device="cpu", threads=1, kv_tokens=4096, engine_timeout=engine_timeout)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Every block waits for it."""
    free, forward = threading.Event(), DecoderBlock.forward

    def stuck(self: DecoderBlock, *arguments: object) -> object:
        free.wait()
        return forward(self, *arguments)

    monkeypatch.setattr(DecoderBlock, "forward", stuck)
    yield free
    free.set()


def test_a_hung_engine_is_an_error(nvila_folder: Path, blocks: threading.Event) -> None:
    """Also for several prompts, whose errors are usually returned: none of them can be answered any more."""
    llm = load(nvila_folder, 0.5)
    for _ in range(2):
        with pytest.raises(EngineError, match=r"has not moved for 0\.5 seconds") as caught:
            llm.generate(["one", "two"], FIVE)
        assert caught.value.code == "engine_hung"


def test_a_slow_engine_is_none(nvila_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, three = load(nvila_folder, LIMIT), SamplingParams(max_tokens=3, ignore_eos=True)
    expected = llm.generate("one", three)[0].output_token_ids
    forward = DecoderBlock.forward

    def slow(self: DecoderBlock, *arguments: object) -> object:
        time.sleep(0.3)
        return forward(self, *arguments)

    monkeypatch.setattr(DecoderBlock, "forward", slow)
    begin = time.monotonic()
    assert llm.generate("one", three)[0].output_token_ids == expected
    assert time.monotonic() - begin > LIMIT


def test_what_a_step_raises_reaches_the_caller(nvila_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = load(nvila_folder, 0.0)
    expected = llm.generate("one", FIVE)[0].output_token_ids
    with monkeypatch.context() as patch:

        def fail() -> None:
            raise RuntimeError("a bug")

        patch.setattr(llm._engine, "step", fail)
        with pytest.raises(RuntimeError, match="a bug"):
            llm.generate("one", FIVE)
    assert llm.generate("one", FIVE)[0].output_token_ids == expected


def test_an_engine_that_nobody_uses_is_freed(nvila_folder: Path) -> None:
    before = threading.active_count()
    llm = load(nvila_folder, 0.0)
    llm.generate("one", FIVE)
    engine = weakref.ref(llm._engine)
    del llm
    # the thread that steps lets go of it a moment later
    eventually(lambda: gc.collect() >= 0 and engine() is None)
    eventually(lambda: threading.active_count() <= before)
