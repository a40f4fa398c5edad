"""Everything that can be set about a training run of both towers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from siglane.errors import UserError
from siglane.settings.options import CommandOptions

INITIAL_BIAS = -10.0  # arXiv:2303.15343: at first almost every pair is told to be none
CHUNK = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(CommandOptions):
    """The facts of a run. All but `workers` and `save_seconds` change the weights it ends with."""

    COMMAND = "train"

    steps: int | None = field(default=None, metadata={"help": "of the optimiser; default: what `epochs` need"})
    epochs: int = field(default=1, metadata={"help": "times the pairs are seen"})
    batch_size: int = field(default=256, metadata={"help": "pairs that are compared with each other"})
    accumulate: int = field(default=1, metadata={"help": "batches of one step"})
    learning_rate: float = field(default=1e-3, metadata={"help": "after the warm-up; it falls to 0 as a cosine"})
    warmup: int = field(default=100, metadata={"help": "steps in which the learning rate rises"})
    weight_decay: float = field(default=1e-4, metadata={"help": "AdamW's, of matrices and tables"})
    clip: float = field(default=1.0, metadata={"help": "largest norm of a step's gradients"})
    lock_image: bool = field(default=False, metadata={"help": "train the text tower alone (SigLiT)"})
    fresh_text: bool = field(default=False, metadata={"help": "begin with a text tower of fresh weights"})
    initial_bias: float = field(default=INITIAL_BIAS, metadata={"help": "b beside fresh weights"})
    chunk: int = field(default=CHUNK, metadata={"help": "texts compared at a time; bounds the loss' memory"})
    precision: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "of the products; auto: bfloat16 where the device has it"}
    )
    seed: int = field(default=0, metadata={"help": "of fresh weights and of the order of the pairs"})
    workers: int = field(default=1, metadata={"help": "processes that read pictures; 0: none"})
    save_seconds: float = field(default=60.0, metadata={"help": "between checkpoints"})

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
