"""Sampling parameters before they reach the engine: what they default to, and whether they can be honoured."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

from siglane.config.vlm import Thinking, VlmConfig
from siglane.errors import UserError
from siglane.types import SamplingParams

logger = logging.getLogger(__name__)


def sampling_defaults(facts: VlmConfig, otherwise: SamplingParams) -> SamplingParams:
    """What a request that names nothing gets: the values its checkpoint states, `otherwise` where it states none."""
    if facts.sampling:
        values = ", ".join(f"{name} {value:g}" for name, value in facts.sampling.items())
        logger.info("sampling defaults from generation_config.json: %s", values)
    return replace(otherwise, **facts.sampling)


def check_sampling(params: SamplingParams) -> None:
    """UserError for a value that no sampler can honour, naming the field."""
    complaint = params.complaint()
    if complaint is not None:
        field, message = complaint
        raise UserError(message, code="invalid_value", param=field)


def check_for_model(params: SamplingParams, vocab_size: int, thinking: Thinking | None) -> None:
    """`check_sampling`, and UserError for what this model cannot do: a bias for no token, a thinking budget where it
    does not reason."""
    check_sampling(params)
    for token_id, bias in params.logit_bias:
        if not 0 <= token_id < vocab_size or not math.isfinite(bias):
            message = f"logit_bias gives token {token_id} a bias of {bias}; ids are below {vocab_size}, biases finite"
            raise UserError(message, code="invalid_value", param="logit_bias")
    if params.thinking_budget is not None and thinking is None:
        message = "this model does not reason, so it takes no thinking_budget; leave it out"
        raise UserError(message, code="invalid_value", param="thinking_budget")
