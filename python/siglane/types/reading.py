"""Log-probabilities of a prompt's own places, which a request may ask for beside an answer or instead of one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Read:
    """What to tell of the token behind `position`, whatever stands there in the prompt.

    token_ids: whose log-probabilities; top: of how many of the likeliest beside them.
    """

    position: int
    token_ids: tuple[int, ...]
    top: int = 0


@dataclass(frozen=True, slots=True)
class Readout:
    """What a `Read` found, in natural logs. logprobs: of its token_ids, in their order; top: (token id,
    log-probability) from likely to unlikely."""

    position: int
    logprobs: tuple[float, ...]
    top: tuple[tuple[int, float], ...] = ()
