"""An engine's steps on a thread of their own: whoever waits for one gets an error when it hangs."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable

import torch

from siglane.engine.engine import Engine
from siglane.engine.process.pulse import Pulse, Stillness, turn_seconds
from siglane.errors import EngineError
from siglane.types import TokenDelta

Job = Callable[[], list[TokenDelta]]
Result = list[TokenDelta] | BaseException


class Stepper:
    """Runs `engine.step` for one caller at a time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._limit = engine.config.resolve_timeout(engine.runner.device.type)
        self._pulse = Pulse()
        self._pulse.follow([engine.runner.model])
        self._hung = False
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Result] = queue.SimpleQueue()
        threading.Thread(target=_work, args=(self._jobs, self._results), name="siglane-steps", daemon=True).start()
        weakref.finalize(self, self._jobs.put, None)

    def step(self) -> list[TokenDelta]:
        """What the step gives, or raises. EngineError when it hangs for the engine's timeout, and ever after."""
        if self._hung:
            raise self._failure()
        self._jobs.put(self._engine.step)
        try:
            result = self._result()
        except KeyboardInterrupt:
            self._result()  # nobody touches the engine in the middle of a step
            raise
        if isinstance(result, BaseException):
            raise result
        return result

    def _result(self) -> Result:
        stillness = Stillness(self._pulse.moves, self._limit)
        while True:
            try:
                return self._results.get(timeout=turn_seconds(self._limit))
            except queue.Empty:
                if stillness.look():
                    self._hung = True
                    raise self._failure() from None

    def _failure(self) -> EngineError:
        message = f"the engine hangs: it has not moved for {self._limit:g} seconds (engine_timeout); start again"
        return EngineError(message, code="engine_hung")


def _work(jobs: queue.SimpleQueue[Job | None], results: queue.SimpleQueue[Result]) -> None:
    """It holds no engine between its jobs, so that one that nobody uses any more is freed."""
    torch.get_num_threads()  # makes torch's choice this thread's too
    while (job := jobs.get()) is not None:
        try:
            results.put(job())
        except BaseException as error:
            results.put(error)
        del job
