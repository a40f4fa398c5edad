"""From logits to the next token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from siglane.engine.batch import Sequence as Running
from siglane.types import SamplingParams, TokenLogprob


class Choice(NamedTuple):
    """The chosen token, with its log-probability when the request asked for it; None when the logits are not finite."""

    token_id: int
    logprob: TokenLogprob | None


def sample(logits: torch.Tensor, sequences: Sequence[Running], eos_token_ids: frozenset[int]) -> list[Choice | None]:
    """logits `[B, vocab_size]`, one row per sequence -> one choice per row.

    Each row is chosen by its own request's parameters and random generator, so neighbours never change it. A row with
    NaN or infinite logits gives None.
    """
    logits = logits.float()
    finite = torch.isfinite(logits).all(dim=-1).tolist()
    best = logits.argmax(dim=-1).tolist()
    choices: list[Choice | None] = []
    for row, running in enumerate(sequences):
        if not finite[row]:
            choices.append(None)
        elif _plain_greedy(running.request.sampling):
            choices.append(Choice(best[row], None))
        else:
            choices.append(_choose(logits[row].cpu(), running, eos_token_ids))
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


def _choose(logits: torch.Tensor, running: Running, eos_token_ids: frozenset[int]) -> Choice:
    params = running.request.sampling
    logprobs = torch.log_softmax(logits, dim=-1) if params.logprobs is not None else None
    scores = _adjust(logits.clone(), running, eos_token_ids)
    if params.temperature == 0:
        token_id = int(scores.argmax())
    else:
        probabilities = filter_probabilities(scores, params)
        token_id = int(torch.multinomial(probabilities, 1, generator=running.generator))
    return Choice(token_id, None if logprobs is None else _report(logprobs, token_id, params.logprobs or 0))


def _adjust(scores: torch.Tensor, running: Running, eos_token_ids: frozenset[int]) -> torch.Tensor:
    """Bias, minimum length and penalties, in vLLM's order and with its meanings."""
    params, output_ids = running.request.sampling, running.output_ids
    if params.logit_bias:
        ids, values = zip(*params.logit_bias, strict=True)
        scores.index_add_(0, torch.tensor(ids), torch.tensor(values, dtype=scores.dtype))
    if len(output_ids) < params.min_tokens:
        scores[sorted({*eos_token_ids, *params.stop_token_ids})] = -torch.inf
    if params.repetition_penalty != 1:
        vocab_size = scores.shape[0]
        prompt_ids = (i for i in running.request.prompt.token_ids if i < vocab_size)
        seen = torch.tensor(sorted({*prompt_ids, *output_ids}))
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
    probabilities = torch.softmax(scores / params.temperature, dim=-1)
    ordered, ids = probabilities.sort(descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if params.top_k > 0:
        keep[params.top_k :] = False
    if params.top_p < 1:
        kept = torch.where(keep, ordered, 0)
        kept = kept / kept.sum()
        keep &= kept.cumsum(0) - kept < params.top_p
    if params.min_p > 0:
        keep &= ordered >= params.min_p * ordered[0]
    keep[0] = True
    return torch.zeros_like(probabilities).scatter_(0, ids, torch.where(keep, ordered, 0))


def _report(logprobs: torch.Tensor, token_id: int, count: int) -> TokenLogprob:
    values, ids = logprobs.topk(count) if count else (logprobs[:0], logprobs[:0])
    top = tuple((int(i), float(value)) for i, value in zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token_id, float(logprobs[token_id]), top)
