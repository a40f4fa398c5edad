"""Where a server embeds pictures and texts: on a thread of its own, or in the engine's process beside a chat."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import torch

from siglane.engine.embed_worker import Calibration, Embedding, EmbeddingJob, EmbeddingQueue, Item, compute
from siglane.engine.load import placement
from siglane.engine.process import EngineProcess
from siglane.errors import EngineError, SiglaneError
from siglane.families.two_tower import TwoTowerModel, load_two_tower
from siglane.nn.cpu.optimise import optimise
from siglane.settings.engine import EngineConfig
from siglane.weights.hub import Checkpoint

logger = logging.getLogger(__name__)

State = Literal["starting", "ready", "dead", "closed"]
CLOSE_SECONDS = 10.0


class Embedder:
    """Loads the model on its thread and embeds what is submitted, from any thread."""

    def __init__(self, checkpoint: Checkpoint, config: EngineConfig) -> None:
        self.state: State = "starting"
        self.failure: SiglaneError | None = None
        self._checkpoint, self._config = checkpoint, config
        self._device, _, self._dtype = placement(config)
        self._queue = EmbeddingQueue(config, self._device)
        self._running: list[EmbeddingJob] = []
        self._calibration: Calibration | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="embedder", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait_ready(self) -> None:
        """Returns when the model is loaded. Raises what kept it from loading."""
        with self._changed:
            self._changed.wait_for(lambda: self.state != "starting")
        if self.state != "ready":
            raise self.failure or EngineError("the model was closed before it was ready", code="engine_closed")

    def submit(self, item: Item) -> Future[Embedding]:
        """The embedding to come. EngineError (503) when the model is not ready."""
        job = EmbeddingJob(item)
        with self._changed:
            if self.state != "ready":
                raise EngineError(f"the model is {self.state}; try again", code="engine_down", status=503)
            self._queue.add(job)
            self._changed.notify_all()
        return job.future

    def scores(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """How likely each pair belongs together: vectors `[I, D]` and `[T, D]`, on the host -> `[I, T]` in 0..1."""
        assert self._calibration is not None, "vectors come from a loaded model"
        return self._calibration.scores(images, texts)

    def fail_all(self, error: SiglaneError) -> None:
        """Ends everything that waits or is computed."""
        with self._changed:
            jobs = [*self._queue.clear(), *self._running]
        for job in jobs:
            job.end(error)

    def close(self) -> None:
        with self._changed:
            self.state = "closed"
            self._changed.notify_all()
        self.fail_all(EngineError("the server is shutting down", code="engine_down", status=503))
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            model = self._load()
        except Exception as error:
            reason = f"the model could not be loaded: {error}"
            self.failure = error if isinstance(error, SiglaneError) else EngineError(reason, code="engine_start")
            self._set_state("dead")
            return
        self._calibration = Calibration.of(model)
        self._set_state("ready")
        try:
            while group := self._next_group():
                compute(model, group)
        except Exception:
            logger.exception("the thread of the model has ended")
            self._set_state("dead")
            self.fail_all(EngineError("the model is down", code="engine_down", status=503))

    def _load(self) -> TwoTowerModel:
        if self._config.threads:
            torch.set_num_threads(self._config.threads)
        began = time.monotonic()
        backend = self._config.attention_backend
        model = load_two_tower(
            self._checkpoint, device=self._device, dtype=self._dtype, attention_backend=backend
        ).model
        optimise(model)
        seconds = time.monotonic() - began
        logger.info("loaded %s in %.1f s (%s, %s)", self._checkpoint.root.name, seconds, self._device, self._dtype)
        return model

    def _set_state(self, state: State) -> None:
        with self._changed:
            if self.state != "closed":
                self.state = state
            self._changed.notify_all()

    def _next_group(self) -> list[EmbeddingJob]:
        """What shares the next forward; empty when the end has come."""
        with self._changed:
            self._running = []
            while not self._running and self.state != "closed":
                self._changed.wait_for(lambda: len(self._queue) or self.state == "closed")
                self._running = self._queue.take()
            return self._running


class EngineEmbedder:
    """The towers that live in a chat model's engine, with the interface of `Embedder`."""

    def __init__(self, engine: EngineProcess) -> None:
        self._engine = engine
        self._numbers = itertools.count()
        self._jobs: dict[int, EmbeddingJob] = {}
        self._commands = ThreadPoolExecutor(1, thread_name_prefix="embedder-commands")  # the pipe may be full

    @property
    def state(self) -> str:
        return self._engine.state

    def wait_ready(self) -> None:
        self._engine.wait_ready()

    def submit(self, item: Item) -> Future[Embedding]:
        """The embedding to come; its error is EngineError (503) when the engine is not ready, or dies under it."""
        number, job = next(self._numbers), EmbeddingJob(item)
        self._jobs[number] = job
        job.future.add_done_callback(lambda future: self._ended(number, future))
        self._commands.submit(self._hand_over, number, job)
        return job.future

    def scores(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """As `Embedder.scores`."""
        assert self._engine.calibration is not None, "vectors come from a loaded model"
        return self._engine.calibration.scores(images, texts)

    def fail_all(self, error: SiglaneError) -> None:
        """Ends everything that waits or is computed."""
        for job in list(self._jobs.values()):
            job.end(error)

    def close(self) -> None:
        self._commands.shutdown(wait=False)

    def _hand_over(self, number: int, job: EmbeddingJob) -> None:
        try:
            self._engine.embed(number, job.item, job.end)
        except SiglaneError as error:
            job.end(error)

    def _ended(self, number: int, future: Future[Embedding]) -> None:
        del self._jobs[number]
        if future.cancelled():
            with contextlib.suppress(RuntimeError):  # the server is closing, and with it the engine
                self._commands.submit(self._engine.forget, number)
