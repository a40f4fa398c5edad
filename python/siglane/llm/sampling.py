"""The sampling parameters of a call: their bounds, and which prompt gets which."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import repeat

from siglane.errors import UserError
from siglane.types import SamplingParams


def check_sampling(params: SamplingParams) -> None:
    """Raises UserError for a value that no sampler can honour, naming the field."""
    bounds: dict[str, tuple[float, float]] = {
        "max_tokens": (1, math.inf),
        "min_tokens": (0, math.inf),
        "temperature": (0, 2),
        "top_p": (0, 1),
        "min_p": (0, 1),
        "top_k": (-1, math.inf),
        "repetition_penalty": (0.01, 100),
        "frequency_penalty": (-2, 2),
        "presence_penalty": (-2, 2),
        "logprobs": (0, math.inf),
        "n": (1, math.inf),
        "thinking_budget": (1, math.inf),
    }
    for name, (low, high) in bounds.items():
        value = getattr(params, name)
        if value is not None and not low <= value <= high:
            limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise UserError(f"{name} must be {limits}, got {value}", code="invalid_value", param=name)
    if not all(params.stop):
        raise UserError("a stop string must not be empty", code="invalid_value", param="stop")


def params_of_each(
    params: SamplingParams | Sequence[SamplingParams] | None, total: int | None
) -> Iterable[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return repeat(params or SamplingParams())
    if total != len(params):
        raise ValueError(
            f"there are {len(params)} params for {'an unknown number of' if total is None else total} prompts"
        )
    return params
