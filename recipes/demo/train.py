"""Trains a demo model from scratch: `python -m recipes.demo.train --out runs/demo [--kind ovis2_5]`.

Two phases. First, tower and projector learn to name what every patch and every row shows (`naming.py`): dense
supervision teaches them to see within minutes, where answers alone would take hours, and puts what they see into the
language model's vocabulary. Then tower, projector and language model learn to answer questions, the naming losses
staying on with a small weight. The naming heads are thrown away at the end.

The learning rate rises, stays and falls in a straight line over the last quarter of the steps. Batches are numbered
and pure (`data.make_batch`), so `--resume` continues to the same weights as a run that was never interrupted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from recipes.demo import native
from recipes.demo.data import Batch, PromptFormat, batches, make_batch
from recipes.demo.export import export
from recipes.demo.model import SHAPE, DemoModel
from recipes.demo.native import NativeModel
from recipes.demo.questions import QUESTION_KINDS
from recipes.demo.tokenizer import train_tokenizer


@dataclass(frozen=True, slots=True)
class Kind:
    """A demo model to train: its prompt_format, tokenizer, modules, and how it is written as a checkpoint."""

    prompt_format: PromptFormat
    tokenizer: Callable[[], Tokenizer]
    model: Callable[[Tokenizer], DemoModel | NativeModel]
    export: Callable[[Any, Tokenizer, Path], None]


NVILA = Kind(SHAPE, train_tokenizer, DemoModel, export)
OVIS = Kind(native.NativePromptFormat(), native.native_tokenizer, NativeModel, native.export)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The facts of a run. Held-out batches come from seed + 1."""

    steps: int = 9000
    seeing_steps: int = 2000  # of the steps, the first ones only name patches and rows
    warmup: int = 200  # of each phase
    decay: float = 0.25  # share of the steps over which the learning rate falls
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    naming_weight: float = 0.1  # of the naming losses in the second phase
    clip: float = 1.0
    seed: int = 1
    kind: Kind = NVILA


RECIPES = {
    "nvila": Recipe(),
    # print of many sizes takes longer to see
    "ovis2_5": Recipe(kind=OVIS, steps=5500, seeing_steps=native.SEEING_STEPS, naming_weight=0.3),
}


def learning_rate(recipe: Recipe, step: int) -> float:
    since = step if step < recipe.seeing_steps else step - recipe.seeing_steps
    left = (recipe.steps - step) / (recipe.decay * recipe.steps)
    return recipe.learning_rate * min(1.0, (since + 1) / recipe.warmup, left)


class Trainer:
    """Model, optimiser and step count: everything a checkpoint holds."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.device, self.step = recipe, device, 0
        self.tokenizer = recipe.kind.tokenizer()
        self.model = recipe.kind.model(self.tokenizer).to(device)
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in self.model.parameters() if parameter.ndim == 1]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))

    def train_on(self, batch: Batch) -> dict[str, float]:
        """One step. The losses by name."""
        recipe = self.recipe
        batch = to_device(batch, self.device)
        with mixed_precision(self.device):
            features, rows = self.model.see(batch.pictures)
            losses = {"naming": self.model.naming_loss(features, rows, batch)}
            total = losses["naming"]
            if self.step >= recipe.seeing_steps:
                logits, targets = self.model.answers(rows, batch)
                losses["answer"] = F.cross_entropy(logits.float(), targets)
                total = losses["answer"] + recipe.naming_weight * losses["naming"]
        self.optimiser.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(recipe, self.step)
        self.optimiser.step()
        self.step += 1
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def save(self, path: Path) -> None:
        state = {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict(), "step": self.step}
        torch.save(state, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)  # an interruption leaves the old checkpoint or the new one

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]


@contextmanager
def mixed_precision(device: torch.device) -> Iterator[None]:
    """bfloat16 products. On CPU, attention as plain matrix products: their backward is several times faster there."""
    if device.type != "cpu":
        with torch.autocast(device.type, torch.bfloat16):
            yield
        return
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # despite its name it rules the CPU's too
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


def to_device(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(getattr(batch, name).to(device, non_blocking=True) for name in Batch.__slots__))


@torch.no_grad()
def held_out_accuracy(trainer: Trainer, held_out: Sequence[Batch]) -> dict[str, float]:
    """Share of exactly right answers per kind of question, and of all.

    An answer is right when each of its tokens is the likeliest after the right ones before it, which is the case
    exactly when greedy decoding gives it.
    """
    right = dict.fromkeys(QUESTION_KINDS, 0)
    asked = dict.fromkeys(QUESTION_KINDS, 0)
    for batch in held_out:
        batch = to_device(batch, trainer.device)
        with mixed_precision(trainer.device):
            _, rows = trainer.model.see(batch.pictures)
            logits, targets = trainer.model.answers(rows, batch)
        wrong = torch.zeros_like(batch.targets, dtype=torch.bool)
        wrong[batch.targets >= 0] = logits.argmax(-1) != targets
        for picture, kinds in enumerate(batch.kinds.tolist()):
            failed = set(batch.branches[picture][wrong[picture]].tolist())
            for branch, kind in enumerate(kinds, 1):
                asked[QUESTION_KINDS[kind]] += 1
                right[QUESTION_KINDS[kind]] += branch not in failed
    accuracy = {kind: right[kind] / max(1, asked[kind]) for kind in QUESTION_KINDS}
    return {"all": sum(right.values()) / sum(asked.values())} | accuracy


def train(trainer: Trainer, out: Path, *, minutes: float, evaluate_every: int = 250, save_every: float = 120.0) -> bool:
    """Trains until the recipe's last step or for `minutes`; False when time ran out first. Writes out/checkpoint.pt,
    out/log.jsonl and, at every save of the second phase, the usable model out/model."""
    recipe = trainer.recipe
    held_out = [
        make_batch(trainer.tokenizer, recipe.kind.prompt_format, recipe.seed + 1, number) for number in range(2)
    ]
    deadline = time.monotonic() + 60 * minutes
    saved = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, context, torch.set_num_threads, (1,)) as pool,
        (out / "log.jsonl").open("a", encoding="utf-8") as log,
        tqdm(total=recipe.steps, initial=trainer.step, unit="step", mininterval=5, dynamic_ncols=True) as bar,
    ):
        accuracy: dict[str, float] = {}
        for batch in batches(pool, trainer.tokenizer, recipe.kind.prompt_format, recipe.seed, trainer.step):
            if trainer.step >= recipe.steps or time.monotonic() > deadline:
                break
            losses = trainer.train_on(batch)
            bar.update()
            if trainer.step % evaluate_every == 0 or trainer.step == recipe.steps:
                if trainer.step > recipe.seeing_steps:
                    accuracy = held_out_accuracy(trainer, held_out)
                log.write(json.dumps({"step": trainer.step, "time": round(time.time())} | losses | accuracy) + "\n")
                log.flush()
            bar.set_postfix_str(" ".join(f"{name} {value:.2f}" for name, value in (losses | accuracy).items()), False)
            if time.monotonic() - saved > save_every:
                save(trainer, out)
                saved = time.monotonic()
        pool.shutdown(wait=False, cancel_futures=True)
    save(trainer, out)
    return trainer.step >= recipe.steps


def save(trainer: Trainer, out: Path) -> None:
    trainer.save(out / "checkpoint.pt")
    if trainer.step > trainer.recipe.seeing_steps:
        fresh = out / "model.part"
        shutil.rmtree(fresh, ignore_errors=True)
        trainer.recipe.kind.export(trainer.model, trainer.tokenizer, fresh)
        shutil.rmtree(out / "model", ignore_errors=True)
        fresh.rename(out / "model")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m recipes.demo.train", description="Train siglane's demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for model/, checkpoint.pt and log.jsonl")
    parser.add_argument("--kind", choices=RECIPES, default="nvila", help="which demo model (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="length of the run (default: the recipe's)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this long; --resume continues")
    parser.add_argument("--resume", action="store_true", help="continue from OUT/checkpoint.pt where there is one")
    parser.add_argument("--seed", type=int, default=Recipe().seed)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--compile", action="store_true", help="a third faster; needs a C++ compiler")
    options = parser.parse_args(arguments)
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint = options.out / "checkpoint.pt"
    if checkpoint.exists() and not options.resume:
        parser.error(f"{checkpoint} exists; add --resume to continue it or choose another --out")
    options.out.mkdir(parents=True, exist_ok=True)
    recipe = RECIPES[options.kind]
    recipe = replace(recipe, steps=options.steps or recipe.steps, seed=options.seed)
    trainer = Trainer(recipe, torch.device(device))
    if checkpoint.exists():
        trainer.load(checkpoint)
    if options.compile:
        for block in (*trainer.model.tower.blocks, *trainer.model.language.blocks):
            block.compile(dynamic=True)
    done = train(trainer, options.out, minutes=options.minutes)
    print(f"step {trainer.step} of {recipe.steps}; " + (f"{options.out / 'model'}" if done else "--resume continues"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
