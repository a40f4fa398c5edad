"""Images and texts that wait for a SigLIP's towers: which of them share a forward, and what each gets."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from siglane.engine.limits import STEP_PATCHES
from siglane.engine.scheduler import BATCH_SHARE
from siglane.errors import EngineError
from siglane.families.two_tower import TEXTS_PER_FORWARD, TwoTowerModel
from siglane.settings.engine import EngineConfig
from siglane.types import ImagePatches

logger = logging.getLogger(__name__)

# arrays and not tensors where there may be thousands: a tensor takes the pipe fifty times as long
Item = ImagePatches | npt.NDArray[np.int64]  # an image, or a text's ids `[length]`


class Embedding(NamedTuple):
    """vector: f32 `[D]` of unit length, on the host; queue, encode: seconds it waited and its forward took."""

    vector: npt.NDArray[np.float32]
    queue: float
    encode: float


class _Waiting(NamedTuple):
    item: Item
    arrived: float


# the items of each that waits, by number; who is first has the next turn
_Turns = deque[OrderedDict[int, _Waiting]]


class _Queues:
    """Items that wait, images and texts by themselves, which take turns while both do."""

    def __init__(self) -> None:
        self._images, self._texts = _Turns(), _Turns()
        self._images_next = True

    def __bool__(self) -> bool:
        return bool(self._images or self._texts)

    def add(self, items: Sequence[tuple[int, Item]]) -> None:
        arrived = time.monotonic()
        for kind, turns in ((ImagePatches, self._images), (np.ndarray, self._texts)):
            if queue := {number: _Waiting(item, arrived) for number, item in items if isinstance(item, kind)}:
                turns.append(OrderedDict(queue))

    def forget(self, number: int) -> None:
        for turns in (self._images, self._texts):
            for queue in turns:
                if queue.pop(number, None) and not queue:
                    turns.remove(queue)
                    break

    def take(self, most_patches: int, most_texts: int) -> dict[int, _Waiting]:
        """What shares the next forward, nothing where nothing waits."""
        images = bool(self._images) and (self._images_next or not self._texts)
        self._images_next = not images
        turns, room = (self._images, most_patches) if images else (self._texts, most_texts)
        taken: dict[int, _Waiting] = {}
        while turns:
            number, first = next(iter(turns[0].items()))
            room -= first.item.layout.patches if isinstance(first.item, ImagePatches) else 1
            if taken and room < 0:
                break
            taken[number] = first
            queue = turns.popleft()
            del queue[number]
            if queue:
                turns.append(queue)
        return taken


class EmbedWorker:
    """Both towers and the items that wait for them, each under a number of its owner's.

    A forward takes images up to `max_batch_patches` patches (a larger one alone), or texts; while both wait, images and
    texts take turns. Those whose items wait do so too: a forward takes one item of each after the other until it is
    full, so that a single text is in the next forward for texts, however many somebody else has sent. Items of a batch
    yield: while anybody else waits, they get one forward of `BATCH_SHARE`.
    """

    def __init__(self, model: TwoTowerModel, config: EngineConfig) -> None:
        device = model.logit_scale.device.type
        self._model = model
        self._most_patches = (config.max_batch_patches or STEP_PATCHES[device]) if config.enable_packing else 0
        self._most_texts = TEXTS_PER_FORWARD[device]
        self._clients, self._batch = _Queues(), _Queues()
        self._passed_over = 0  # times that the batch has yielded

    @property
    def has_work(self) -> bool:
        return bool(self._clients or self._batch)

    def add(self, items: Sequence[tuple[int, Item]], batch: bool = False) -> None:
        """items: what one client waits for, or a batch."""
        (self._batch if batch else self._clients).add(items)

    def forget(self, number: int) -> None:
        """Drops an item whose client has left, if it still waits."""
        for queues in (self._clients, self._batch):
            queues.forget(number)

    def step(self, clients_chat: bool = False) -> list[tuple[int, Embedding | EngineError]]:
        """One forward: what each of its items gets. What fails in company is tried again alone, so that nobody pays for
        a neighbour. Call it while there is work; nothing where a batch's items yield to clients_chat: somebody waits
        for the chat model."""
        taken = self._whose_turn(clients_chat).take(self._most_patches, self._most_texts)
        if not taken:
            return []
        began = time.monotonic()
        vectors = _embed(self._model, [waiting.item for waiting in taken.values()])
        seconds = time.monotonic() - began
        return [
            (number, vector if isinstance(vector, EngineError) else Embedding(vector, began - waiting.arrived, seconds))
            for (number, waiting), vector in zip(taken.items(), vectors, strict=True)
        ]

    def _whose_turn(self, clients_chat: bool) -> _Queues:
        if not self._batch:
            return self._clients
        if (self._clients or clients_chat) and self._passed_over < BATCH_SHARE - 1:
            self._passed_over += 1
            return self._clients
        self._passed_over = 0
        return self._batch


@torch.inference_mode()
def _embed(model: TwoTowerModel, items: Sequence[Item]) -> list[npt.NDArray[np.float32] | EngineError]:
    """The vectors of items of one kind, or why an item has none."""
    try:
        rows = _forward(model, items).cpu().numpy()
    except torch.AcceleratorError:  # the device is lost for this process: end it, its supervisor starts another
        raise
    except Exception as error:
        if len(items) > 1:
            return [result for item in items for result in _embed(model, [item])]
        logger.exception("an item could not be embedded")
        return [EngineError(f"it could not be embedded ({type(error).__name__})", code="internal_error")]
    undefined = EngineError("the model gives no finite numbers for it; use another dtype", code="not_finite")
    # each owns its memory: a slice would keep the whole batch
    return [row.copy() if np.isfinite(row).all() else undefined for row in rows]


def _forward(model: TwoTowerModel, items: Sequence[Item]) -> torch.Tensor:
    images = [item for item in items if isinstance(item, ImagePatches)]
    if images:
        return model.embed_images(images)
    return model.embed_texts(torch.from_numpy(np.stack([item for item in items if isinstance(item, np.ndarray)])))
