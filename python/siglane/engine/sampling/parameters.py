"""Sampling parameters before they reach the engine: what they default to, and whether they can be honoured."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

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


def in_plain_shapes(params: SamplingParams) -> SamplingParams:
    """What OpenAI's and vLLM's clients may write too: one stop string, lists, biases as a dict. What has no such shape
    is left for `check_sampling`."""
    given: dict[str, Any] = {name: getattr(params, name) for name in ("stop", "stop_token_ids", "logit_bias")}
    if isinstance(given["stop"], str):
        given["stop"] = (given["stop"],)
    if isinstance(given["logit_bias"], Mapping):
        given["logit_bias"] = [(int(i) if _is_number(i) else i, bias) for i, bias in given["logit_bias"].items()]
    lists = {name: tuple(value or ()) for name, value in given.items() if value is None or isinstance(value, list)}
    return replace(params, **given | lists)


def _is_number(text: object) -> bool:
    return isinstance(text, str) and text.isascii() and text.isdigit()


def check_sampling(params: SamplingParams) -> None:
    """UserError for a value that no sampler can honour, naming the field."""
    complaint = params.complaint()
    if complaint is not None:
        field, message = complaint
        raise UserError(message, code="invalid_value", param=field)


def check_for_model(params: SamplingParams, vocab_size: int, thinking: Thinking | None) -> None:
    """`check_sampling`, and UserError for what this model cannot do: a bias for no token, an end at one, a thinking
    budget where it does not reason."""
    check_sampling(params)
    if strange := [token for token in params.stop_token_ids if not 0 <= token < vocab_size]:
        message = f"stop_token_ids holds {strange[0]}; the model's token ids are below {vocab_size}"
        raise UserError(message, code="invalid_value", param="stop_token_ids")
    for token_id, bias in params.logit_bias:
        if not 0 <= token_id < vocab_size or not math.isfinite(bias):
            message = f"logit_bias gives token {token_id} a bias of {bias}; ids are below {vocab_size}, biases finite"
            raise UserError(message, code="invalid_value", param="logit_bias")
    if params.thinking_budget is not None and thinking is None:
        message = "this model does not reason, so it takes no thinking_budget; leave it out"
        raise UserError(message, code="invalid_value", param="thinking_budget")
