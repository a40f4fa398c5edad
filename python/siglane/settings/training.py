"""Everything that can be set about a training run of both towers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from siglane.errors import UserError
from siglane.settings.options import CommandOptions, option

INITIAL_BIAS = -10.0  # arXiv:2303.15343: at first almost every pair is told to be none
CHUNK = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(CommandOptions):
    """The facts of a run. All but `workers` and `save_seconds` change the weights it ends with."""

    COMMAND = "train"

    steps: int | None = option(None, "of the optimiser; default: what `epochs` need")
    epochs: int = option(1, "times the pairs are seen")
    batch_size: int = option(256, "pairs that are compared with each other")
    accumulate: int = option(1, "batches of one step")
    learning_rate: float = option(1e-3, "after the warm-up; it falls to 0 as a cosine")
    warmup: int = option(100, "steps in which the learning rate rises")
    weight_decay: float = option(1e-4, "AdamW's, of matrices and tables")
    clip: float = option(1.0, "largest norm of a step's gradients")
    lock_image: bool = option(False, "train the text tower alone (SigLiT)")
    fresh_text: bool = option(False, "begin with a text tower of fresh weights")
    initial_bias: float = option(INITIAL_BIAS, "b beside fresh weights")
    chunk: int = option(CHUNK, "texts compared at a time; bounds the loss' memory")
    precision: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "of the products; auto: bfloat16 where the device has it"
    )
    seed: int = option(0, "of fresh weights and of the order of the pairs")
    workers: int = option(1, "processes that read pictures; 0: none")
    save_seconds: float = option(60.0, "between checkpoints")

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "chunk", "learning_rate", "clip"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}", code="bad_option", param=name)
        for name in ("warmup", "weight_decay", "workers", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative", code="bad_option", param=name)
        if self.steps is not None and self.steps <= 0:
            raise UserError(f"steps must be positive, got {self.steps}", code="bad_option", param="steps")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step number `step` of `steps`."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, steps - self.warmup)))

    def facts(self) -> dict[str, Any]:
        """What a resumed run must share with the one it continues."""
        return {name: value for name, value in asdict(self).items() if name not in ("workers", "save_seconds")}
