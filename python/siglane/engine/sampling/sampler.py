"""From logits to the next token. A row's choice depends on its own request, its logits and a hash (`noise.py`)."""

from __future__ import annotations

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
from siglane.engine.sampling.noise import LUCK, MOST_NOISE, gumbel_noise, lucky_tokens, noise_key
from siglane.errors import EngineError
from siglane.types import SamplingParams, TokenLogprob

logger = logging.getLogger(__name__)

SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny
LOWEST = torch.finfo(torch.float32).min  # of scores that can be chosen
WINDOW = 1024  # likeliest tokens among which filters look first
BLOCK = 32  # tokens whose greatest score stands for them
FEW = 1 / 16  # of a vocabulary: to compute the noise of so many tokens costs less than to find who may win
CANDIDATES = 16  # that filters are asked about one by one, where they leave more than a window


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
        return _draw_filtered(scores, params, key)
    reach = float(_noise(torch.tensor([best]), key)) - MOST_NOISE  # what is below cannot overtake the best
    if _count(scores, reach) > FEW * len(scores):
        token_ids, values = contenders(scores, key, 1)
    else:
        token_ids = _places(scores, reach)
        values = scores[token_ids] + _noise(token_ids, key)
    return int(token_ids[_first_greatest(values)])


def contenders(scores: torch.Tensor, key: tuple[int, int], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """At least the `count` tokens whose scores are the greatest with their noise, and all with equal ones: ids i64 in
    order, and those sums. Noise is computed of the lucky ones, and of those who could reach them without luck."""
    lucky = lucky_tokens(len(scores), key)
    values = scores[lucky] + _noise(lucky, key)
    least = float(values.topk(count).values[-1]) if len(values) >= count else -math.inf
    others = np.setdiff1d(_places(scores, least - LUCK).numpy(), lucky.numpy(), assume_unique=True)
    if len(others):
        rest = torch.from_numpy(others)
        values = torch.cat((values, scores[rest] + _noise(rest, key)))
        lucky, order = torch.cat((lucky, rest)).sort()
        values = values[order]
    there = values >= least
    return lucky[there], values[there]


def _noise(token_ids: torch.Tensor, key: tuple[int, int]) -> torch.Tensor:
    return gumbel_noise(token_ids.int(), key)


def _draw_filtered(scores: torch.Tensor, params: SamplingParams, key: tuple[int, int]) -> int:
    """A token of `filtered`. Of very many it is quicker to ask whether they hold one who would win among all."""
    left = _within_window(scores, params)
    if left is None:
        token_ids, values = contenders(scores, key, CANDIDATES)
        inside = partial(_is_left, scores, scores.exp(), params)
        order = np.lexsort((-scores[token_ids].numpy(), -values.numpy()))  # as of `filtered`, where noise makes equals
        found = next((token_id for token_id in token_ids[order].tolist() if inside(token_id)), None)
        if found is not None:
            return found
        left = _among_all(scores, params)
    return int(left.token_ids[_first_greatest(left.scores + _noise(left.token_ids, key))])


def filtered(scores: torch.Tensor, params: SamplingParams) -> Likeliest:
    """The tokens that top-k, then top-p among those, and min-p leave: at least one. scores `[vocab_size]`, at the
    temperature, the greatest 0.

    top-p keeps the smallest set of likeliest tokens whose probabilities reach top_p; ties break by token id.
    """
    return _within_window(scores, params) or _among_all(scores, params)


def _within_window(scores: torch.Tensor, params: SamplingParams) -> Likeliest | None:
    """None where more than a window is left."""
    some = likeliest(scores, max(WINDOW, params.top_k))
    kept = _kept(scores, some, params)
    if WINDOW <= kept == len(some.scores) < len(scores) and params.top_k <= 0:
        return None
    return Likeliest(some.token_ids[:kept], some.scores[:kept])


def _among_all(scores: torch.Tensor, params: SamplingParams) -> Likeliest:
    some = likeliest(scores, len(scores))
    kept = _kept(scores, some, params)
    return Likeliest(some.token_ids[:kept], some.scores[:kept])


def _is_left(scores: torch.Tensor, powers: torch.Tensor, params: SamplingParams, token_id: int) -> bool:
    """Whether `_among_all` has it, without top-k, by the same numbers. powers: of all scores."""
    own, power = scores[token_id], powers[token_id]
    if power < params.min_p:
        return False
    before = powers.where(scores > own, 0).sum(dtype=torch.float64) + power.double() * (scores[:token_id] == own).sum()
    return params.top_p >= 1 or bool((before + power).float() - power < params.top_p * powers.sum())


def _kept(scores: torch.Tensor, some: Likeliest, params: SamplingParams) -> int:
    """How many of the likeliest pass."""
    powers = (some.scores[: params.top_k] if params.top_k > 0 else some.scores).exp()
    keep = powers >= params.min_p
    if params.top_p < 1:
        whole = powers if params.top_k > 0 else scores.exp()
        keep &= powers.cumsum(0) - powers < params.top_p * whole.sum()
    return max(1, int(keep.sum()))


def likeliest(scores: torch.Tensor, count: int) -> Likeliest:
    """All tokens from some score on that at least `count` reach, or all there are above -inf."""
    blocks = len(scores) // BLOCK
    if 0 < count < blocks:
        least = scores[: blocks * BLOCK].view(blocks, BLOCK).amax(-1).topk(count).values[-1]
        token_ids = _places(scores, max(float(least), LOWEST))
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
