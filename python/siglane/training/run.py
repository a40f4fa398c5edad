"""A training run on image-text pairs from its first step, or from where it stopped, to its last: `siglane train`.

Batch number i is a function of the seed alone and a checkpoint holds weights, optimiser and step, so a resumed run ends
with the weights of one that was never interrupted. Stored pictures go through a locked image tower once, before the
first step.

Started by `torchrun`, ranks share every batch: each loads and embeds its part, and the texts travel between them.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from siglane.errors import UserError
from siglane.families.two_tower import load_two_tower
from siglane.settings.training import TrainConfig
from siglane.training.contrastive import Trainer, mixed_precision
from siglane.training.files import copy_files, fresh_two_tower, start_weights, write_files, write_weights
from siglane.training.pairs import Batch, Pairs, batch_indices, loaded_ahead
from siglane.training.report import Skipped
from siglane.training.sigmoid import INITIAL_LOG_SCALE, Group
from siglane.weights.hub import Checkpoint
from siglane.weights.quantised import refuse_codes

CHECKPOINT, MODEL, LOG, LOCKED = "checkpoint.pt", "model", "log.jsonl", "images.safetensors"
CAPTIONS = 4096  # of pairs without an end, for the tokenizer


@dataclass(frozen=True, slots=True)
class Share:
    """This rank's part of every batch: every `ranks`-th pair."""

    rank: int = 0
    ranks: int = 1

    @classmethod
    def of(cls, group: Group | None) -> Share:
        return cls() if group is None else cls(dist.get_rank(group), dist.get_world_size(group))


def open_run(
    source: Checkpoint | Path,
    pairs: Pairs,
    out: Path,
    config: TrainConfig,
    device: torch.device,
    *,
    resume: bool = False,
) -> Trainer:
    """The trainer of a run in folder `out`, at the step of its checkpoint when it is resumed.

    source: a model to go on from, or the configuration file of one to begin from scratch. UserError when `out` holds a
    run that is not to be resumed, or one with other settings; ConfigError or WeightError for a source of no use.
    """
    if isinstance(source, Checkpoint):
        refuse_codes(source)
    group = world()
    checkpoint, folder = out / CHECKPOINT, out / MODEL
    if checkpoint.exists() and not resume:
        message = f"{checkpoint} exists; add --resume to continue it, or choose another folder"
        raise UserError(message, code="run_exists")
    if checkpoint.exists():
        trainer = Trainer(fresh_two_tower(folder, device), config, pairs, group)
        trainer.load(checkpoint)
        return trainer
    if Share.of(group).rank == 0:
        if isinstance(source, Checkpoint):
            copy_files(source, folder)
        else:
            write_files(source, (pairs[number].caption for number in range(pairs.size or CAPTIONS)), folder)
    if group is not None:
        dist.barrier(group)
    torch.manual_seed(config.seed)  # the same weights on every rank
    scalars = INITIAL_LOG_SCALE, config.initial_bias
    if isinstance(source, Checkpoint):
        two_tower = load_two_tower(source, device=device, dtype=torch.float32)
        if config.fresh_text:
            start_weights(two_tower.model, two_tower.model.text, *scalars)
    else:
        two_tower = fresh_two_tower(folder, device)
        start_weights(two_tower.model, two_tower.model, *scalars)
    return Trainer(two_tower, config, pairs, group)


def world() -> Group | None:
    """The ranks of this run; None for a process alone."""
    return dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None


def join_ranks(device: torch.device) -> torch.device:
    """Joins the processes that `torchrun` started, if it did; returns this rank's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device == torch.device("cuda"):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def leave_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def train(
    trainer: Trainer,
    pairs: Pairs,
    out: Path,
    *,
    skipped: Skipped,
    store: torch.dtype = torch.float32,
    minutes: float = math.inf,
) -> None:
    """Trains to the last step or for `minutes`, whichever comes first.

    Writes, on the first rank, out/checkpoint.pt and out/model (weights as `store`) at every save, and a line of
    out/log.jsonl per step. Pairs that cannot be used are left out and added to `skipped`. UserError when a batch has no
    other.
    """
    config = trainer.config
    first = Share.of(trainer.group).rank == 0
    deadline, saved = time.monotonic() + 60 * minutes, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        log = stack.enter_context(_log(out / LOG, trainer.step)) if first else None
        bar = stack.enter_context(
            tqdm(total=trainer.steps, initial=trainer.step, unit="step", dynamic_ncols=True, disable=not first)
        )
        pool = stack.enter_context(readers(config.workers))
        batches = _batches(trainer, pairs, out, pool, skipped)
        while group := tuple(islice(batches, config.accumulate)):
            for batch in group:
                skipped.add(batch.bad)
                if not batch.numbers and trainer.group is None:
                    raise UserError("not one pair of a batch can be used; look at the ones skipped", code="bad_pairs")
            facts = trainer.train_on(group)
            if log is not None:
                log.write(json.dumps({"step": trainer.step, "time": round(time.time(), 1)} | facts) + "\n")
                log.flush()
            bar.update()
            bar.set_postfix_str(f"loss {facts['loss']:.3f}", refresh=False)
            stop = _agreed(trainer.group, time.monotonic() > deadline, trainer.device)
            if first and (time.monotonic() - saved > config.save_seconds or stop or trainer.done):
                save(trainer, out, store)
                saved = time.monotonic()
            if stop:
                break
        pool.shutdown(wait=False, cancel_futures=True)
    _share_skipped(skipped, trainer.group)


def save(trainer: Trainer, out: Path, store: torch.dtype) -> None:
    trainer.save(out / CHECKPOINT)
    write_weights(trainer.model, out / MODEL, store)


def readers(workers: int) -> Executor:
    """What reads pictures beside the training: processes, or a thread where none are wanted."""
    if workers == 0:
        return ThreadPoolExecutor(1)
    return ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,))


@contextmanager
def _log(path: Path, step: int) -> Iterator[Any]:
    """Open for appending, without what an interrupted run wrote beyond its last checkpoint."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    path.write_text("".join(kept), encoding="utf-8")
    with path.open("a", encoding="utf-8") as log:
        yield log


def _agreed(group: Group | None, flag: bool, device: torch.device) -> bool:
    """Whether any rank raised its flag: clocks differ, and all must stop after the same step."""
    if group is None:
        return flag
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    return bool(flags)


def _share_skipped(skipped: Skipped, group: Group | None) -> None:
    """Adds what the other ranks left out and have named."""
    if group is None:
        return
    every: list[dict[str, list[str]]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(every, skipped.kinds, group=group)
    for kinds in every:
        skipped.merge(kinds)


def _batches(trainer: Trainer, pairs: Pairs, out: Path, pool: Executor, skipped: Skipped) -> Iterator[Batch]:
    """This rank's part of the batches that are left."""
    config, share = trainer.config, Share.of(trainer.group)
    numbers = range(trainer.step * config.accumulate, trainer.steps * config.accumulate)
    groups = (
        batch_indices(pairs.size, config.batch_size, config.seed, number)[share.rank :: share.ranks].tolist()
        for number in numbers
    )
    if not config.lock_image or pairs.size is None:
        return loaded_ahead(pool, pairs, trainer.two_tower.images, groups)
    path = out / LOCKED
    if share.rank == 0 and (trainer.step == 0 or not path.exists()):
        embed_locked(trainer, pairs, pairs.size, path, pool, skipped)
    if trainer.group is not None:
        dist.barrier(trainer.group)
    locked = LockedImages(**load_file(path))
    return (locked.batch(pairs, group) for group in groups)


@dataclass(frozen=True, slots=True, eq=False)
class LockedImages:
    """What a locked tower gives for every stored picture. embeddings: `[pairs, D]`, unit length; usable: bool
    `[pairs]`, false where the picture cannot be read."""

    embeddings: torch.Tensor
    usable: torch.Tensor

    def batch(self, pairs: Pairs, numbers: Sequence[int]) -> Batch:
        kept = tuple(number for number in numbers if self.usable[number])
        return Batch(kept, self.embeddings[list(kept)], tuple(pairs[number].caption for number in kept), ())


@torch.no_grad()
def embed_locked(trainer: Trainer, pairs: Pairs, size: int, path: Path, pool: Executor, skipped: Skipped) -> None:
    """Writes `LockedImages` of pairs 0 to size - 1, each through the tower once, in an order of its own: whenever a run
    is interrupted, they are the same."""
    embeddings = torch.zeros(size, trainer.model.config.text.projection_size)
    usable = torch.zeros(size, dtype=torch.bool)
    step = trainer.config.batch_size
    groups = (range(start, min(start + step, size)) for start in range(0, size, step))
    with tqdm(total=size, unit="image", desc="locked tower", dynamic_ncols=True) as bar:
        for batch in loaded_ahead(pool, pairs, trainer.two_tower.images, groups):
            skipped.add(batch.bad)
            if batch.numbers and not isinstance(batch.images, torch.Tensor):
                with mixed_precision(trainer.device, trainer.products):
                    found = trainer.model.embed_images(batch.images)
                embeddings[list(batch.numbers)] = found.float().cpu()
                usable[list(batch.numbers)] = True
            bar.update(len(batch.numbers) + len(batch.bad))
    save_file({"embeddings": embeddings, "usable": usable}, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)
