"""A reasoning model's thinking, token by token: what a prompt says about it, and what ends it when its budget is spent.

A budget of n tokens means: an answer whose first n tokens hold no `</think>` goes on with the model's forced ids (a
sentence and `</think>`), then as the model likes. The reference (AIDC-AI/Ovis, `generate` with a thinking budget) calls
the model twice; here the forced ids are chosen for it, one per step, so that log-probabilities, penalties, stop tokens,
preemption and the caches treat them as the generated tokens they are. Different on purpose: forced ids count against
`max_tokens` one by one, so that it is never exceeded, and every end-of-answer token ends an answer that still thinks.
As in the reference, the budget does not ask whether the model has begun with `<think>`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from siglane.config.vlm import Thinking
from siglane.types import SamplingParams

ThinkingStart = Literal["free", "opened", "closed"]


@dataclass(frozen=True, slots=True)
class ThinkingBudget:
    """tokens: generated before the model has to answer, `<think>` among them."""

    tokens: int
    thinking: Thinking

    def forced_id(self, output_ids: Sequence[int]) -> int | None:
        """The token that must follow `output_ids`, None where the model chooses."""
        place = len(output_ids) - self.tokens
        if not 0 <= place < len(self.thinking.forced) or self.thinking.end in output_ids[: self.tokens]:
            return None
        return self.thinking.forced[place]


def thinking_start(prompt_ids: Sequence[int], thinking: Thinking, eos_token_ids: Collection[int]) -> ThinkingStart:
    """What the prompt says about the answer's thinking; tags before its last end of a turn say nothing.

    <|im_start|>assistant\\n                                  free: the model may begin with <think>
    <|im_start|>assistant\\n<think>\\n                         opened
    <|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n           closed: `enable_thinking` is false
    """
    for token_id in reversed(prompt_ids):
        if token_id == thinking.end:
            return "closed"
        if token_id == thinking.start:
            return "opened"
        if token_id in eos_token_ids:
            break
    return "free"


def thinking_budget(
    params: SamplingParams, prompt_ids: Sequence[int], thinking: Thinking | None, eos_token_ids: Collection[int]
) -> ThinkingBudget | None:
    """The budget that is in force; None without one, and where the prompt has closed the thinking already."""
    if thinking is None or params.thinking_budget is None:
        return None
    closed = thinking_start(prompt_ids, thinking, eos_token_ids) == "closed"
    return None if closed else ThinkingBudget(params.thinking_budget, thinking)
