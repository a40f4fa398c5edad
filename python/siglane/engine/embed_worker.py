"""Pictures and texts that wait for a SigLIP's towers: which of them share a forward, and what each gets."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from siglane.engine.engine import STEP_PATCHES
from siglane.errors import EngineError, SiglaneError
from siglane.families.two_tower import TwoTowerModel
from siglane.settings.engine import EngineConfig
from siglane.types import ImagePatches

logger = logging.getLogger(__name__)

Item = ImagePatches | torch.Tensor  # a picture, or a text's ids i64 `[length]`
TEXTS = {"cpu": 32, "cuda": 512}  # of one forward


class Embedding(NamedTuple):
    """vector: f32 `[D]` of unit length, on the host; queue, encode: seconds it waited and its forward took."""

    vector: torch.Tensor
    queue: float
    encode: float


class Calibration(NamedTuple):
    """What turns cosines into logits; both f32 `[1]`, on the host."""

    scale: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def of(cls, model: TwoTowerModel) -> Calibration:
        return cls(model.logit_scale.exp().cpu(), model.logit_bias.cpu())

    def scores(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """How likely each pair belongs together: vectors `[I, D]` and `[T, D]`, on the host -> `[I, T]` in 0..1."""
        return (images @ texts.T * self.scale + self.bias).sigmoid()


@dataclass(slots=True, eq=False)
class EmbeddingJob:
    item: Item
    future: Future[Embedding] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)

    def end(self, result: Embedding | SiglaneError) -> None:
        """Once; what comes later, or after its client has left, changes nothing."""
        with contextlib.suppress(InvalidStateError):
            if isinstance(result, Embedding):
                self.future.set_result(result)
            else:
                self.future.set_exception(result)


class EmbeddingQueue:
    """A forward takes images up to `max_batch_patches` patches (a larger one alone), or texts; which of the two is told
    by who has waited longest. Knows no threads: whoever shares it locks it."""

    def __init__(self, config: EngineConfig, device: torch.device) -> None:
        self._patches = (config.max_batch_patches or STEP_PATCHES[device.type]) if config.enable_packing else 0
        self._texts = TEXTS[device.type]
        self._images: deque[EmbeddingJob] = deque()
        self._ids: deque[EmbeddingJob] = deque()

    def __len__(self) -> int:
        return len(self._images) + len(self._ids)

    def add(self, job: EmbeddingJob) -> None:
        (self._images if isinstance(job.item, ImagePatches) else self._ids).append(job)

    def take(self) -> list[EmbeddingJob]:
        """What shares the next forward; empty when nothing waits. Whoever has left by now takes no room in it."""
        taken: list[EmbeddingJob] = []
        while not taken and len(self):
            waiting = min((queue for queue in (self._images, self._ids) if queue), key=lambda queue: queue[0].arrived)
            room = self._texts if waiting is self._ids else self._patches
            while waiting and (not taken or _cost(waiting[0].item) <= room):
                job = waiting.popleft()
                if job.future.set_running_or_notify_cancel():
                    taken.append(job)
                    room -= _cost(job.item)
        return taken

    def clear(self) -> list[EmbeddingJob]:
        """Forgets everything that waits, and returns it."""
        jobs = [*self._images, *self._ids]
        self._images.clear()
        self._ids.clear()
        return jobs


def compute(model: TwoTowerModel, jobs: Sequence[EmbeddingJob]) -> None:
    """Ends jobs of one kind. What fails in company is tried again alone, so that nobody pays for a neighbour."""
    began = time.monotonic()
    vectors = _embed(model, [job.item for job in jobs])
    seconds = time.monotonic() - began
    for job, vector in zip(jobs, vectors, strict=True):
        waited = began - job.arrived
        job.end(vector if isinstance(vector, SiglaneError) else Embedding(vector, waited, seconds))


def _cost(item: Item) -> int:
    return item.layout.patches if isinstance(item, ImagePatches) else 1


@torch.inference_mode()
def _embed(model: TwoTowerModel, items: Sequence[Item]) -> list[torch.Tensor | SiglaneError]:
    """The vectors of items of one kind, or why an item has none."""
    if not items:
        return []
    try:
        rows = _forward(model, items).cpu()
    except torch.AcceleratorError:  # the device is lost for this process
        raise
    except Exception as error:
        if len(items) > 1:
            return [result for item in items for result in _embed(model, [item])]
        logger.exception("an item could not be embedded")
        return [EngineError(f"it could not be embedded ({type(error).__name__})", code="internal_error")]
    undefined = EngineError("the model gives no finite numbers for it; use another dtype", code="not_finite")
    # each owns its memory: a slice would keep the whole batch
    return [row.clone() if bool(row.isfinite().all()) else undefined for row in rows]


def _forward(model: TwoTowerModel, items: Sequence[Item]) -> torch.Tensor:
    images = [item for item in items if isinstance(item, ImagePatches)]
    if images:
        return model.embed_images(images)
    return model.embed_texts(torch.stack([item for item in items if isinstance(item, torch.Tensor)]))
