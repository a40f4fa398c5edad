"""A kernel is chosen by what it computes: each candidate runs once on a few rows, the first that is right is taken.

So a signature that was misread, a package built for another GPU or a bug of a release costs speed, never an answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeVar

import torch

from siglane.errors import EngineError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# of values of about 1: what kernels round differently, and less than a wrong scale, mask or pairing makes
TOLERANCE = MappingProxyType({torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2})


def first_right(
    what: str, candidates: Mapping[str, T], run: Callable[[T], torch.Tensor], expected: torch.Tensor
) -> tuple[str, T]:
    """The first candidate, and its name, whose result is `expected`, which was computed in float32. Logs which it is,
    and why others before it are not; EngineError, which tells every reason, when none is left."""
    reasons = []
    for name, candidate in candidates.items():
        reason = fault(lambda candidate=candidate: run(candidate), expected)  # type: ignore[misc]
        if reason is None:
            logger.info("%s: %s", what, name)
            return name, candidate
        reasons.append(f"{name}: {reason}")
        logger.warning("%s: %s is not used here: %s", what, name, reason)
    raise EngineError(f"{what}: no kernel gives right numbers on this device ({'; '.join(reasons)})")


def fault(run: Callable[[], torch.Tensor], expected: torch.Tensor) -> str | None:
    """What is wrong with the result of `run`, None where nothing is."""
    try:
        result = run()
        if result.shape != expected.shape:
            return f"gives {list(result.shape)} instead of {list(expected.shape)}"
        if result.dtype not in TOLERANCE:
            return f"gives {result.dtype}"
        furthest = float((result.float() - expected.to(result.device)).abs().max())
    except Exception as error:  # whatever a foreign package raises
        lines = str(error).splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}".removesuffix(": ")
    return None if furthest <= TOLERANCE[result.dtype] else f"is {furthest:.2g} off"
