"""Batches of pictures and questions. Batch number i is a pure function of (seed, i): a run resumes by counting.

Every picture is encoded once and asked several questions. The questions of one picture share one sequence: a common
beginning and one branch per question, each branch seeing the beginning and itself only:

    <|im_start|>system ... user\\n <image> x 16 \\n \\n | What ...? ... red<|im_end|> | How many ...? ... 2<|im_end|>
    branch          0                                | 1                           | 2

A branch's positions continue the beginning's, so each is, to the last bit of arithmetic, the single-turn conversation
that a server is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

from recipes.demo.questions import QUESTION_KINDS, Question, ask_any, typed_carelessly
from recipes.demo.scenes import Scene, draw, patch_labels, random_page, random_scene
from recipes.demo.tokenizer import END, IMAGE, PAD, START, SYSTEM, special_id
from siglane.lm.attention import SegmentAttention
from siglane.types import Grid, Resample, Size

# reading a sign and naming everything are harder than the rest and are asked more often
_SHARES = {"describe": 2, "count": 1.5, "colour": 1, "shape": 1, "size": 0.7, "left": 2, "exists": 1.3, "sign": 3.5}
WEIGHTS = tuple(_SHARES[kind] / sum(_SHARES.values()) for kind in QUESTION_KINDS)
IGNORE = -100
PADDING = -1  # branch number of filling


@dataclass(frozen=True, slots=True)
class BatchImages:
    """What the pictures of one batch have in common.

    images: how many; canvas: of their scenes, None for any; print_scales: of their signs, one drawn for each; size:
    pixels after the model's resize with `resample`; grid: of patches; rows: placeholders in the prompt.
    """

    images: int
    canvas: Size | None
    print_scales: tuple[float, ...]
    size: Size
    resample: Resample
    grid: Grid
    rows: int


class PromptFormat(Protocol):
    """How one kind of demo model sees and is asked: what batches need to know of it."""

    @property
    def questions(self) -> int:
        """Asked about each picture."""
        ...

    def batch_images(self, rng: np.random.Generator) -> BatchImages:
        """Of the next batch."""
        ...

    def is_page(self, number: int) -> bool:
        """Whether batch `number` holds pages to look at, with nothing asked about them (`scenes.random_page`)."""
        ...

    def beginning(self, tokenizer: Tokenizer, rows: int) -> list[int]:
        """Token ids in front of every question, `rows` placeholders among them."""
        ...

    def ending(self, question: str) -> str:
        """The question and what stands between it and the answer."""
        ...


@dataclass(frozen=True, slots=True)
class BatchShape:
    """NVILA's prompt_format: images pictures squashed to tile x tile pixels, rows of the projector for each."""

    images: int
    questions: int
    tile: int
    patch: int
    rows: int

    @property
    def grid(self) -> Grid:
        return Grid(self.tile // self.patch, self.tile // self.patch)

    def batch_images(self, rng: np.random.Generator) -> BatchImages:
        return BatchImages(self.images, None, (1.0,), Size(self.tile, self.tile), "bicubic", self.grid, self.rows)

    def is_page(self, number: int) -> bool:
        return False

    def beginning(self, tokenizer: Tokenizer, rows: int) -> list[int]:
        ids: list[int] = tokenizer.encode(beginning(rows)).ids
        return ids

    def ending(self, question: str) -> str:
        return ending(question)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """pictures u8 `[B, height, width, 3]`; labels i64 `[B, h * w, 6]` (`scenes.patch_labels`); the others i64 `[B, L]`.

    targets hold the next token where it belongs to an answer, IGNORE elsewhere; kinds `[B, K]` number the kind of each
    branch's question (branch k + 1 is question k).
    """

    pictures: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    branches: torch.Tensor
    targets: torch.Tensor
    kinds: torch.Tensor


def make_batch(tokenizer: Tokenizer, prompt_format: PromptFormat, seed: int, number: int) -> Batch:
    rng = np.random.default_rng([seed, number])
    batch_images = prompt_format.batch_images(rng)
    page = prompt_format.is_page(number)
    scenes = [_scene(batch_images, page, rng) for _ in range(batch_images.images)]
    questions = 0 if page else prompt_format.questions
    asked = [[ask_any(scene, rng, WEIGHTS) for _ in range(questions)] for scene in scenes]
    pictures = torch.stack(
        [torch.from_numpy(resized(scene, batch_images.size, batch_images.resample)) for scene in scenes]
    )
    labels = torch.from_numpy(np.stack([patch_labels(scene, batch_images.grid) for scene in scenes]))
    kinds = torch.tensor([[QUESTION_KINDS.index(question.kind) for question in questions] for questions in asked])
    start = prompt_format.beginning(tokenizer, batch_images.rows)
    sequences = [_sequence(tokenizer, prompt_format, start, questions, rng) for questions in asked]
    longest = max(len(sequence[0]) for sequence in sequences)
    ids, positions, branches, targets = (
        torch.tensor([column + [filling] * (longest - len(column)) for column in columns])
        for columns, filling in zip(
            zip(*sequences, strict=True), (special_id(tokenizer, PAD), 0, PADDING, IGNORE), strict=True
        )
    )
    return Batch(pictures, labels, ids, positions, branches, targets, kinds)


def _scene(batch_images: BatchImages, page: bool, rng: np.random.Generator) -> Scene:
    scale = _one(batch_images.print_scales, rng)
    if page and batch_images.canvas is not None:
        return random_page(rng, batch_images.canvas, scale)
    return random_scene(rng, canvas=batch_images.canvas, print_scale=scale)


def _one(scales: tuple[float, ...], rng: np.random.Generator) -> float:
    return scales[0] if len(scales) == 1 else scales[rng.integers(len(scales))]


def resized(scene: Scene, size: Size, resample: Resample) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """u8 `[height, width, 3]`: the picture as siglane's image path resizes it (Pillow, aspect ignored)."""
    return np.array(draw(scene).resize(size, Image.Resampling[resample.upper()]))


def beginning(rows: int) -> str:
    """What stands before every question: formats.md 5.6, one picture of one tile."""
    return f"{START}system\n{SYSTEM}{END}\n{START}user\n{IMAGE * rows}\n\n"


def ending(question: str) -> str:
    return f"{question}{END}\n{START}assistant\n"


Columns = tuple[list[int], list[int], list[int], list[int]]


def _sequence(
    tokenizer: Tokenizer,
    prompt_format: PromptFormat,
    common: list[int],
    questions: Sequence[Question],
    rng: np.random.Generator,
) -> Columns:
    """ids, positions, branches and targets of one picture, whose branches share the beginning `common`."""
    ids = list(common)
    start = len(ids)
    positions, branches, targets = list(range(start)), [0] * start, [IGNORE] * start
    for number, question in enumerate(questions, 1):
        asked = tokenizer.encode(prompt_format.ending(typed_carelessly(question.text, rng))).ids
        answer = tokenizer.encode(question.answer + END).ids
        branch = asked + answer[:-1]  # the last token is only predicted
        ids += branch
        positions += range(start, start + len(branch))
        branches += [number] * len(branch)
        targets += [IGNORE] * (len(asked) - 1) + answer
    return ids, positions, branches, targets


def branch_attention(branches: torch.Tensor) -> SegmentAttention:
    """Sequences that share a beginning: all see branch 0, else only their own. branches: i64 `[B, L]`."""
    sequences, length = branches.shape
    same = branches[:, :, None] == branches[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=branches.device).tril()
    return SegmentAttention([length] * sequences, mask=(same | (branches[:, None, :] == 0)) & causal)


def batches(
    pool: Executor, tokenizer: Tokenizer, prompt_format: PromptFormat, seed: int, first: int, ahead: int = 6
) -> Iterator[Batch]:
    """Batches first, first + 1, ... without end, painted `ahead` of their use by the pool."""
    waiting: list[Future[Batch]] = []
    number = first
    while True:
        while len(waiting) < ahead:
            waiting.append(pool.submit(make_batch, tokenizer, prompt_format, seed, number))
            number += 1
        yield waiting.pop(0).result()
