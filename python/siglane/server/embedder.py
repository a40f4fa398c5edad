"""Both towers of a SigLIP on one thread: what all clients wait for at the same time shares a forward."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from siglane.engine.config import EngineConfig
from siglane.engine.engine import STEP_PATCHES
from siglane.engine.load import placement
from siglane.errors import EngineError, SiglaneError
from siglane.families.dual import DualModel, load_dual
from siglane.nn.prepack import prepack
from siglane.types import ImagePatches
from siglane.weights.hub import Checkpoint

logger = logging.getLogger(__name__)

State = Literal["starting", "ready", "dead", "closed"]
Item = ImagePatches | torch.Tensor  # a picture, or a text's ids i64 `[length]`
TEXTS = {"cpu": 32, "cuda": 512}  # of one forward
CLOSE_SECONDS = 10.0


class Embedding(NamedTuple):
    """vector: f32 `[D]` of unit length, on the host; queue, encode: seconds it waited and its forward took."""

    vector: torch.Tensor
    queue: float
    encode: float


@dataclass(slots=True, eq=False)
class _Job:
    item: Item
    future: Future[Embedding] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)

    def end(self, result: Embedding | SiglaneError) -> None:
        with contextlib.suppress(InvalidStateError):  # its client has left, or the server told it that it ends
            if isinstance(result, Embedding):
                self.future.set_result(result)
            else:
                self.future.set_exception(result)


class Embedder:
    """Loads the model on its thread and embeds what is submitted, from any thread.

    A forward takes pictures up to `max_seq_len` patches (a larger one alone), or texts; which of the two is told by who
    has waited longest. What fails in company is tried again alone, so that nobody pays for a neighbour.
    """

    def __init__(self, checkpoint: Checkpoint, config: EngineConfig) -> None:
        self.state: State = "starting"
        self.failure: SiglaneError | None = None
        self._checkpoint, self._config = checkpoint, config
        self._device, _, self._dtype = placement(config)
        self._patches = (config.max_seq_len or STEP_PATCHES[self._device.type]) if config.enable_packing else 0
        self._texts = TEXTS[self._device.type]
        self._images: deque[_Job] = deque()
        self._ids: deque[_Job] = deque()
        self._running: list[_Job] = []
        self._scale, self._bias = torch.empty(0), torch.empty(0)
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
        job = _Job(item)
        with self._changed:
            if self.state != "ready":
                raise EngineError(f"the model is {self.state}; try again", code="engine_down", status=503)
            (self._images if isinstance(item, ImagePatches) else self._ids).append(job)
            self._changed.notify_all()
        return job.future

    def scores(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """How likely each pair belongs together: vectors `[I, D]` and `[T, D]`, on the host -> `[I, T]` in 0..1."""
        return (images @ texts.T * self._scale + self._bias).sigmoid()

    def fail_all(self, error: SiglaneError) -> None:
        """Ends everything that waits or is computed."""
        with self._changed:
            jobs = [*self._images, *self._ids, *self._running]
            self._images.clear()
            self._ids.clear()
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
        self._scale, self._bias = model.logit_scale.exp().cpu(), model.logit_bias.cpu()
        self._set_state("ready")
        try:
            while group := self._next_group():
                self._compute(model, group)
        except Exception:
            logger.exception("the thread of the model has ended")
            self._set_state("dead")
            self.fail_all(EngineError("the model is down", code="engine_down", status=503))

    def _load(self) -> DualModel:
        if self._config.threads:
            torch.set_num_threads(self._config.threads)
        began = time.monotonic()
        backend = self._config.attention_backend
        model = load_dual(self._checkpoint, device=self._device, dtype=self._dtype, attention_backend=backend).model
        prepack(model)
        seconds = time.monotonic() - began
        logger.info("loaded %s in %.1f s (%s, %s)", self._checkpoint.root.name, seconds, self._device, self._dtype)
        return model

    def _set_state(self, state: State) -> None:
        with self._changed:
            if self.state != "closed":
                self.state = state
            self._changed.notify_all()

    def _next_group(self) -> list[_Job]:
        """What shares the next forward; empty when the end has come. Whoever has left by now takes no room in it."""
        with self._changed:
            while True:
                self._running = []
                self._changed.wait_for(lambda: self._images or self._ids or self.state == "closed")
                if self.state == "closed":
                    return []
                queues = (queue for queue in (self._images, self._ids) if queue)
                waiting = min(queues, key=lambda queue: queue[0].arrived)
                room = self._texts if waiting is self._ids else self._patches
                while waiting and (not self._running or _cost(waiting[0].item) <= room):
                    job = waiting.popleft()
                    if job.future.set_running_or_notify_cancel():
                        self._running.append(job)
                        room -= _cost(job.item)
                if self._running:
                    return self._running

    def _compute(self, model: DualModel, jobs: Sequence[_Job]) -> None:
        began = time.monotonic()
        vectors = _embed(model, [job.item for job in jobs])
        seconds = time.monotonic() - began
        for job, vector in zip(jobs, vectors, strict=True):
            waited = began - job.arrived
            job.end(vector if isinstance(vector, SiglaneError) else Embedding(vector, waited, seconds))


def _cost(item: Item) -> int:
    return item.layout.patches if isinstance(item, ImagePatches) else 1


@torch.inference_mode()
def _embed(model: DualModel, items: Sequence[Item]) -> list[torch.Tensor | SiglaneError]:
    """The vectors of items of one kind, or why an item has none."""
    if not items:
        return []
    try:
        rows = _forward(model, items).cpu()
    except Exception as error:
        if len(items) > 1:
            return [result for item in items for result in _embed(model, [item])]
        logger.exception("an item could not be embedded")
        return [EngineError(f"it could not be embedded ({type(error).__name__})", code="internal_error")]
    undefined = EngineError("the model gives no finite numbers for it; use another dtype", code="not_finite")
    # each owns its memory: a slice would keep the whole batch
    return [row.clone() if bool(row.isfinite().all()) else undefined for row in rows]


def _forward(model: DualModel, items: Sequence[Item]) -> torch.Tensor:
    images = [item for item in items if isinstance(item, ImagePatches)]
    if images:
        return model.embed_images(images)
    return model.embed_texts(torch.stack([item for item in items if isinstance(item, torch.Tensor)]))
