"""A computation that is slow is told from one that hangs, and time in which nobody could move counts for nobody."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import nn
from waiting import PATIENCE

from siglane.engine.process import pulse
from siglane.engine.process.pulse import Pulse, Stillness, Watch, turn_seconds
from siglane.errors import ConfigError
from siglane.settings.engine import EngineConfig


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pulse, "time", clock)
    return clock


def looks_until_still(stillness: Stillness, clock: Clock, step: float, most: int = 10_000) -> int | None:
    for count in range(1, most + 1):
        clock.now += step
        if stillness.look():
            return count
    return None


@pytest.mark.parametrize(("limit", "looks"), [(60.0, 60), (300.0, 300), (2.0, 4), (1.0, 4)])
def test_what_does_not_move_is_still_after_the_limit(clock: Clock, limit: float, looks: int) -> None:
    assert looks_until_still(Stillness(lambda: 7, limit), clock, turn_seconds(limit)) == looks


def test_what_moves_is_never_still(clock: Clock) -> None:
    counted = Pulse()
    stillness = Stillness(counted.moves, 10)
    for _ in range(50):
        for _ in range(9):
            clock.now += 1
            assert not stillness.look()
        counted.move()


def test_a_limit_without_end_is_never_reached(clock: Clock) -> None:
    assert turn_seconds(float("inf")) == 1
    assert looks_until_still(Stillness(lambda: 7, float("inf")), clock, 3600.0, 100) is None


def test_hours_in_which_the_watcher_was_stopped_do_not_count(clock: Clock) -> None:
    stillness = Stillness(lambda: 7, 60)
    for _ in range(20):
        clock.now += 3600
        assert not stillness.look()


def test_whoever_waits_is_not_still(clock: Clock) -> None:
    counted = Pulse()
    stillness = Stillness(counted.moves, 5)
    with counted.waiting():
        assert looks_until_still(stillness, clock, 1, 100) is None
    clock.now += 1
    assert not stillness.look()
    assert looks_until_still(stillness, clock, 1) == 5


class Stack(nn.Module):
    """Two layers of two parts each, and a norm."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers, self.norm = layers, nn.LayerNorm(2)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            rows = layer(rows)
        return self.norm(rows)


def test_every_layer_of_a_forward_is_a_move() -> None:
    layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2))
    first, second = Stack(layers), Stack(layers)
    counted = Pulse()
    counted.follow([first, second])
    first(torch.zeros(1, 2))
    assert counted.moves() == 3  # two layers and a norm; what both share counts once
    second(torch.zeros(1, 2))
    assert counted.moves() == 6


def test_a_watch_calls_once_and_not_after_its_context() -> None:
    called = threading.Event()
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        called.set()

    with Watch(lambda: 7, 0.1, call):
        assert called.wait(PATIENCE)
        time.sleep(0.3)
    with Watch(lambda: 7, 0.5, call):
        pass
    time.sleep(0.7)
    assert calls == [1]


@pytest.mark.parametrize(
    ("setting", "cpu", "cuda", "silence"), [(0.0, 60, 300, 60), (5.0, 5, 5, 5), (*[float("inf")] * 4,)]
)
def test_how_long_an_engine_may_stand_still(setting: float, cpu: float, cuda: float, silence: float) -> None:
    config = EngineConfig(engine_timeout=setting)
    assert (config.resolve_timeout("cpu"), config.resolve_timeout("cuda"), config.silence_limit) == (cpu, cuda, silence)


@pytest.mark.parametrize("setting", [-1.0, float("nan")])
def test_a_limit_that_is_none_is_refused(setting: float) -> None:
    with pytest.raises(ConfigError, match="engine_timeout must be at least 0"):
        EngineConfig(engine_timeout=setting)
