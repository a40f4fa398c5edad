"""From logits to the next token. A row's choice depends on its own request, its logits and a hash (`noise.py`)."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from collections.abc import Sequence as Items
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from siglane.engine.batch import NextToken
from siglane.engine.constraints.constraint import Bits
from siglane.engine.edits import Edits
from siglane.engine.sampling.noise import MOST_NOISE, gumbel_noise, noise_key
from siglane.errors import EngineError
from siglane.types import SamplingParams, TokenLogprob

logger = logging.getLogger(__name__)

SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny
WINDOW = 1024  # likeliest tokens among which filters look first
BLOCK = 32  # tokens whose greatest score stands for them
FEW = 0.25  # of a vocabulary: to find so many tokens first costs less than noise for all


class SampledToken(NamedTuple):
    """The chosen token, with its log-probability when the request asked for it."""

    token_id: int
    logprob: TokenLogprob | None


class Likeliest(NamedTuple):
    """Tokens i64 `[N]` and their scores, from likely to unlikely, ties by id."""

    token_ids: torch.Tensor
    scores: torch.Tensor


def sample(
    logits: torch.Tensor, next_tokens: Items[NextToken], eos_token_ids: frozenset[int]
) -> list[SampledToken | EngineError]:
    """logits `[B, vocab_size]`, one row per token -> one choice per row.

    A row with NaN or infinite logits, or one that fails, gives an error and leaves the others alone. Rows go one by
    one, each in the cache: a sum over several adds up in another order than over one.
    """
    rows = zip(logits.float().cpu().unbind(), next_tokens, strict=True)
    return [_choose_isolated(row, next_token, eos_token_ids) for row, next_token in rows]


Choices = list[SampledToken | EngineError]
# (logits, next_tokens, eos_token_ids) as of `sample`: may only enqueue; what it returns is called once, and waits
Choose = Callable[[torch.Tensor, Items[NextToken], frozenset[int]], Callable[[], Choices]]


def choose_on_host(
    logits: torch.Tensor, next_tokens: Items[NextToken], eos_token_ids: frozenset[int]
) -> Callable[[], Choices]:
    """`sample`, when the choices are wanted."""
    return partial(sample, logits, next_tokens, eos_token_ids)


def bad_logits() -> EngineError:
    return EngineError("the model gave NaN or infinite logits", code="engine_nan")


def _choose_isolated(
    logits: torch.Tensor, next_token: NextToken, eos_token_ids: frozenset[int]
) -> SampledToken | EngineError:
    if not (math.isfinite(logits.sum()) or logits.isfinite().all()):
        return bad_logits()
    try:
        return _choose(logits, next_token, eos_token_ids)
    except EngineError as error:
        return error
    except Exception as error:
        logger.exception("choosing a token failed", extra=next_token.request.log_fields)
        return EngineError(f"the next token could not be chosen ({type(error).__name__})")


def _choose(logits: torch.Tensor, next_token: NextToken, eos_token_ids: frozenset[int]) -> SampledToken:
    params, token_id = next_token.request.sampling, next_token.forced_id
    if token_id is None:
        edits = Edits.of(params, next_token.answered, next_token.tally, eos_token_ids)
        scores = logits if edits is None else edits.applied(logits)
        if next_token.constrained is not None:
            scores = _matching(scores, logits, next_token.constrained.allowed(next_token.guesses))
        token_id = draw(scores, params, noise_key(next_token.seed, next_token.answered))
    return SampledToken(token_id, None if params.logprobs is None else _report(logits, token_id, params.logprobs))


def _matching(scores: torch.Tensor, logits: torch.Tensor, allowed: Bits | None) -> torch.Tensor:
    """Scores of the tokens that a grammar allows; their logits where what the request adds leaves none, as min_tokens
    does where the grammar has come to its end."""
    if allowed is None:
        return scores
    kept = torch.from_numpy(allowed)
    found = scores.where(kept, -torch.inf)
    return found if found.max() > -torch.inf else logits.where(kept, -torch.inf)


def draw(scores: torch.Tensor, params: SamplingParams, key: tuple[int, int]) -> int:
    """A token by its probability, the likeliest at temperature 0. scores float32 `[vocab_size]`; key: of the noise."""
    best = _first_greatest(scores)
    if params.temperature == 0:
        return best
    if scores[best] == -torch.inf:
        raise RuntimeError("no token may be chosen")
    scores = scores - scores[best]  # all at most 0: no overflow
    if params.temperature != 1:
        scores /= max(params.temperature, SMALLEST_TEMPERATURE)
    if params.top_k > 0 or params.top_p < 1 or params.min_p > 0:
        token_ids, scores = filtered(scores, params)
        return int(token_ids[_first_greatest(scores + gumbel_noise(token_ids.int(), key))])
    every = _token_ids(len(scores))
    reach = float(gumbel_noise(every[best : best + 1], key)) - MOST_NOISE  # what is below cannot overtake the best
    if _count(scores, reach) <= FEW * len(scores):
        token_ids = _places(scores, reach)
        return int(token_ids[_first_greatest(scores[token_ids] + gumbel_noise(token_ids.int(), key))])
    return _first_greatest(gumbel_noise(every, key).add_(scores))


def filtered(scores: torch.Tensor, params: SamplingParams) -> Likeliest:
    """The tokens that top-k, then top-p among those, and min-p leave: at least one. scores `[vocab_size]`, at the
    temperature, the greatest 0.

    top-p keeps the smallest set of likeliest tokens whose probabilities reach top_p; ties break by token id.
    """
    some = likeliest(scores, max(WINDOW, params.top_k))
    kept = _kept(scores, some, params)
    if kept == len(some.scores) < len(scores) and params.top_k <= 0:
        some = likeliest(scores, len(scores))
        kept = _kept(scores, some, params)
    return Likeliest(some.token_ids[:kept], some.scores[:kept])


def _kept(scores: torch.Tensor, some: Likeliest, params: SamplingParams) -> int:
    """How many of the likeliest pass."""
    powers = (some.scores[: params.top_k] if params.top_k > 0 else some.scores).exp()
    keep = powers >= params.min_p
    if params.top_p < 1:
        whole = powers if params.top_k > 0 else scores.exp()
        keep &= powers.cumsum(0) - powers < params.top_p * whole.sum()
    return max(1, int(keep.sum()))


def likeliest(scores: torch.Tensor, count: int) -> Likeliest:
    """All tokens from some score on that at least `count` reach, or all there are."""
    blocks = len(scores) // BLOCK
    if 0 < count < blocks:
        least = scores[: blocks * BLOCK].view(blocks, BLOCK).amax(-1).topk(count).values[-1]
        token_ids = _places(scores, float(least))
        scores = scores[token_ids]
    else:
        token_ids = torch.arange(len(scores))
    scores, order = scores.sort(descending=True, stable=True)
    return Likeliest(token_ids[order], scores)


def _report(logits: torch.Tensor, token_id: int, count: int) -> TokenLogprob:
    total = logits.logsumexp(0)
    top = likeliest(logits, count)
    pairs = zip(top.token_ids[:count].tolist(), (top.scores[:count] - total).tolist(), strict=True)
    return TokenLogprob(token_id, float(logits[token_id] - total), tuple(pairs))


# numpy takes a part of torch's time for these


def _first_greatest(scores: torch.Tensor) -> int:
    return int(scores.numpy().argmax())


def _count(scores: torch.Tensor, least: float) -> int:
    return int(np.count_nonzero(scores.numpy() >= np.float32(least)))


def _places(scores: torch.Tensor, least: float) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(scores.numpy() >= np.float32(least)))


@functools.cache
def _token_ids(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32)
