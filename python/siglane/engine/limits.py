"""What one step may cost where the configuration says 0, and what no step exceeds."""

from __future__ import annotations

from typing import NamedTuple

from siglane.engine.scheduler import StepBudget
from siglane.settings.engine import EngineConfig

# a CPU gains nothing from larger steps and makes others wait
STEP_TOKENS = {"cpu": 512, "cuda": 4096}
STEP_PATCHES = {"cpu": 1024, "cuda": 16384}
# rows up to which answers are guessed ahead: what a step reads of the weights is the most of its time until there
STEP_GUESSING = {"cpu": 16, "cuda": 64}


def padded_rows(rows: int, device_type: str) -> int:
    """Rows with which a step of `rows` goes through the layers. oneDNN makes a kernel of about 0.7 MB, in milliseconds,
    for every number of rows that a product has, so that on a CPU there must not be hundreds of them."""
    if device_type != "cpu":
        return rows
    step = 1 if rows <= 16 else 4 if rows <= 64 else 8 if rows <= 128 else 16
    return -(-rows // step) * step


def step_budget(config: EngineConfig, device_type: str) -> StepBudget:
    return StepBudget(
        tokens=config.max_batch_tokens or STEP_TOKENS[device_type],
        patches=config.max_batch_patches or STEP_PATCHES[device_type],
        running=config.max_running,
        guessing=STEP_GUESSING[device_type],
    )


class StepLimits(NamedTuple):
    """Of every step: sequences, tokens, pages of one sequence."""

    running: int
    tokens: int
    columns: int

    @classmethod
    def of(cls, budget: StepBudget, context_length: int, page_size: int) -> StepLimits:
        """A sequence holds its context, and guesses behind it."""
        return cls(budget.running, budget.tokens, -(-(context_length + budget.guessing) // page_size))

    @property
    def numbers(self) -> int:
        """Of a plan: tokens, positions, slots, chosen rows and those that are read; rows and lengths of decodes; three
        of prefills; the whole table, a row, a column and a page each."""
        return 5 * (self.tokens + self.running) + 5 * (self.running + 1) + 3 * self.running * self.columns
