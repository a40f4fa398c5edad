"""From logits to the next token."""

from __future__ import annotations

import logging
from collections import Counter
from typing import NamedTuple

import torch

from siglane.engine.batch import Sequence
from siglane.errors import EngineError
from siglane.types import SamplingParams, TokenLogprob

logger = logging.getLogger(__name__)

SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny
HEAD = 1024  # likeliest tokens among which top-p looks first


class SampledToken(NamedTuple):
    """The chosen token, with its log-probability when the request asked for it."""

    token_id: int
    logprob: TokenLogprob | None


def sample(
    logits: torch.Tensor, sequences: list[Sequence], eos_token_ids: frozenset[int]
) -> list[SampledToken | EngineError]:
    """logits `[B, vocab_size]`, one row per sequence -> one choice per row.

    Each row is chosen by its own request's parameters and random generator, so neighbours never change it. A row with
    NaN or infinite logits, or one that fails, gives an error and leaves the others alone.
    """
    logits = logits.float()
    finite = torch.isfinite(logits).all(dim=-1).tolist()
    best = logits.argmax(dim=-1).tolist()
    choices: list[SampledToken | EngineError] = []
    for row, sequence in enumerate(sequences):
        if not finite[row]:
            choices.append(EngineError("the model gave NaN or infinite logits", code="engine_nan"))
        elif sequence.forced_id is None and _plain_greedy(sequence.request.sampling):
            choices.append(SampledToken(best[row], None))
        else:
            choices.append(_choose_isolated(logits[row].cpu(), sequence, eos_token_ids))
    return choices


def _plain_greedy(params: SamplingParams) -> bool:
    """Whether the likeliest token is the answer as it stands."""
    neutral = SamplingParams()
    return (
        params.temperature == 0
        and params.logprobs is None
        and not params.logit_bias
        and params.min_tokens == 0
        and params.repetition_penalty == neutral.repetition_penalty
        and params.frequency_penalty == neutral.frequency_penalty
        and params.presence_penalty == neutral.presence_penalty
    )


def _choose_isolated(
    logits: torch.Tensor, sequence: Sequence, eos_token_ids: frozenset[int]
) -> SampledToken | EngineError:
    try:
        return _choose(logits, sequence, eos_token_ids)
    except Exception as error:
        logger.exception("choosing a token failed", extra=sequence.request.log_fields)
        return EngineError(f"the next token could not be chosen ({type(error).__name__})")


def _choose(logits: torch.Tensor, sequence: Sequence, eos_token_ids: frozenset[int]) -> SampledToken:
    params = sequence.request.sampling
    logprobs = torch.log_softmax(logits, dim=-1) if params.logprobs is not None else None
    forced_id = sequence.forced_id
    token_id = _draw(logits, sequence, eos_token_ids) if forced_id is None else forced_id
    return SampledToken(token_id, None if logprobs is None else _report(logprobs, token_id, params.logprobs or 0))


def _draw(logits: torch.Tensor, sequence: Sequence, eos_token_ids: frozenset[int]) -> int:
    params = sequence.request.sampling
    scores = _adjust(logits.clone(), sequence, eos_token_ids)
    if params.temperature == 0:
        return int(scores.argmax())
    probabilities = filter_probabilities(scores, params)
    return int(torch.multinomial(probabilities, 1, generator=sequence.generator))


def _adjust(scores: torch.Tensor, sequence: Sequence, eos_token_ids: frozenset[int]) -> torch.Tensor:
    """Bias, minimum length and penalties, in vLLM's order and with its meanings."""
    params, output_ids, vocab_size = sequence.request.sampling, sequence.output_ids, scores.shape[0]
    if params.logit_bias:
        ids, values = zip(*params.logit_bias, strict=True)
        scores.index_add_(0, torch.tensor(ids), torch.tensor(values, dtype=scores.dtype))
    if len(output_ids) < params.min_tokens:
        ends = sorted({i for i in (*eos_token_ids, *params.stop_token_ids) if 0 <= i < vocab_size})
        scores[ends] = -torch.inf
    if params.repetition_penalty != 1:  # placeholders may lie outside the vocabulary
        seen = torch.tensor(sorted({i for i in sequence.token_ids if 0 <= i < vocab_size}), dtype=torch.long)
        values_seen = scores[seen]
        penalty = params.repetition_penalty
        scores[seen] = torch.where(values_seen > 0, values_seen / penalty, values_seen * penalty)
    if (params.frequency_penalty or params.presence_penalty) and output_ids:
        counts = Counter(output_ids)
        ids_out = torch.tensor(list(counts))
        times = torch.tensor(list(counts.values()), dtype=scores.dtype)
        scores[ids_out] -= params.frequency_penalty * times + params.presence_penalty
    return scores


def filter_probabilities(scores: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Softmax at the temperature, then top-k, top-p and min-p; the rest is zero, not renormalised. `[vocab_size]`.

    top-p keeps the smallest set of likeliest tokens whose probabilities reach top_p; ties break by token id.
    """
    temperature = max(params.temperature, SMALLEST_TEMPERATURE)
    probabilities = torch.softmax((scores - scores.max()) / temperature, dim=-1)  # the maximum is 0: no overflow
    if params.top_k <= 0 and params.top_p >= 1 and params.min_p <= 0:
        return probabilities
    ids = _candidates(probabilities, params)
    ordered, order = probabilities[ids].sort(descending=True, stable=True)
    if params.top_k > 0:
        ordered, order = ordered[: params.top_k], order[: params.top_k]
    keep = ordered >= params.min_p * ordered[0]
    if params.top_p < 1:
        likelier = ordered.cumsum(0) - ordered
        keep &= likelier < params.top_p * (ordered.sum() if params.top_k > 0 else 1)
    keep[0] = True
    return torch.zeros_like(probabilities).scatter_(0, ids[order], torch.where(keep, ordered, 0))


def _candidates(probabilities: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Ids, ascending, that hold all tokens the filters can keep: few, sorting a whole vocabulary takes milliseconds."""
    if params.top_k <= 0 and params.top_p >= 1:
        return (probabilities >= params.min_p * probabilities.max()).nonzero().flatten()
    count = params.top_k if params.top_k > 0 else HEAD
    least = probabilities.topk(min(count, len(probabilities))).values[-1]
    ids = ((probabilities >= least) & (probabilities > 0)).nonzero().flatten()
    enough = params.top_k > 0 or probabilities[ids].sum() >= params.top_p
    return ids if enough else torch.arange(len(probabilities))


def _report(logprobs: torch.Tensor, token_id: int, count: int) -> TokenLogprob:
    values, ids = logprobs.topk(min(count, logprobs.shape[0]))
    top = tuple((int(i), float(value)) for i, value in zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token_id, float(logprobs[token_id]), top)
