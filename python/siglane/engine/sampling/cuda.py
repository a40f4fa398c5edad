"""`sampler.py` where the logits lie: a step's choices are enqueued behind its forward and read in one piece.

Numbers are the host's own: the same noise, the same order among equals. What needs more than a few likely tokens, and
every row that is broken, is left to the host, which reads that row alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from siglane.engine.batch import NextToken
from siglane.engine.constraints.constraint import mask_words
from siglane.engine.edits import edit
from siglane.engine.sampling.noise import gumbel_noise, noise_key
from siglane.engine.sampling.plan import Filters, Numbers, SamplingPlan, most_numbers
from siglane.engine.sampling.sampler import WINDOW, Choices, SampledToken, sample
from siglane.engine.words import Written
from siglane.nn.cuda.ops import OPS
from siglane.nn.trial import first_right
from siglane.types import TokenLogprob

# (scores float32 `[N, vocab_size]`, their peaks, temperatures float32 `[N]`, keys i64 `[2, N]`) -> token ids i64 `[N]`
Best = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# (scores float32 `[N, vocab_size]`, masks i32 `[M, words]`, rows i64 `[M]`): what a mask has no bit for becomes -inf
Keep = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


class ChoiceKernels(NamedTuple):
    """What looks at whole vocabularies."""

    best: Best
    keep: Keep


class DeviceSampler:
    """`Choose` for logits of `device`, at most `rows` of them in a step."""

    def __init__(self, rows: int, device: torch.device, kernels: ChoiceKernels) -> None:
        capacity = most_numbers(rows)
        self._words = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._turns = itertools.cycle([Written(capacity, device) for _ in range(2)])
        self._kernels = kernels

    def __call__(
        self, logits: torch.Tensor, next_tokens: Sequence[NextToken], eos_token_ids: frozenset[int]
    ) -> Callable[[], Choices]:
        plan = SamplingPlan.of(next_tokens, eos_token_ids, logits.shape[1])
        written = next(self._turns)
        written.write(plan.words())
        packed = choose(logits, Numbers.of(written.copy_to(self._words)), plan.top, self._kernels)
        return partial(_read, packed, plan, logits, next_tokens, eos_token_ids)


def choose(logits: torch.Tensor, numbers: Numbers, top: int, kernels: ChoiceKernels) -> torch.Tensor:
    """logits `[N, vocab_size]` -> i32, flat: the chosen ids `[N]`; whether each is sure `[N]`; of reported rows the ids
    of the `top` likeliest `[R, top]`, log-probabilities of the chosen one and those `[R, 1 + top]`, floats as bits."""
    wide = logits.float()
    low, peaks = wide.aminmax(dim=-1)
    sure, scores = low.isfinite() & peaks.isfinite(), wide
    if numbers.edited:
        scores = wide.clone(memory_format=torch.contiguous_format)
        edit(scores.view(-1), numbers.pairs)
        if len(numbers.masked):
            kernels.keep(scores, numbers.masks, numbers.masked)
        peaks = scores.amax(-1)
        sure &= peaks > -torch.inf  # else nothing is left: the host knows what then
    token_ids = kernels.best(scores.contiguous(), peaks, numbers.temperatures, numbers.keys)
    rows = numbers.filters.rows
    if len(rows):
        own, peak, temperature = (x.index_select(0, rows) for x in (scores, peaks, numbers.temperatures))
        scaled = (own - peak[:, None]) / temperature[:, None]
        found, enough = _filtered(scaled, numbers.keys.index_select(1, rows), numbers.filters)
        token_ids.index_copy_(0, rows, found)
        sure.index_copy_(0, rows, sure.index_select(0, rows) & enough)
    token_ids = torch.where(numbers.forced < 0, token_ids, numbers.forced)
    parts = [token_ids.int(), sure.int()]
    if len(numbers.reported):
        asked = wide.index_select(0, numbers.reported)
        chosen = token_ids.index_select(0, numbers.reported).clamp(0, logits.shape[1] - 1)[:, None]
        total = asked.logsumexp(-1, keepdim=True)
        likeliest = _likeliest(asked, top)
        found = torch.cat((chosen, likeliest), 1)
        parts += [likeliest.int().flatten(), (asked.gather(1, found) - total).view(torch.int32).flatten()]
    return torch.cat(parts)


def _filtered(scores: torch.Tensor, keys: torch.Tensor, filters: Filters) -> tuple[torch.Tensor, torch.Tensor]:
    """`filtered` of `sampler.py` for several rows and a draw among what is left -> token ids i64 and whether the
    likeliest `WINDOW` were enough, bool, `[F]`. scores: at the temperature, the greatest of each row 0; keys i64
    `[2, F]`. Sums are float64: in float32 they differ with the number of rows."""
    window = min(WINDOW, scores.shape[1])
    token_ids = _likeliest(scores, window)
    some = scores.gather(1, token_ids)
    powers, column = some.exp(), torch.arange(window, device=scores.device)
    wanted = filters.top_k > 0
    inside = ~wanted | (column < filters.top_k)
    whole = torch.where(
        wanted, (powers * inside).sum(-1, keepdim=True, dtype=torch.float64),
        scores.exp().sum(-1, keepdim=True, dtype=torch.float64),
    )  # fmt: skip
    before = powers.cumsum(-1, dtype=torch.float64) - powers
    keep = inside & (powers >= filters.min_p) & ((filters.top_p >= 1) | (before < filters.top_p * whole))
    enough = (wanted[:, 0] | ~keep[:, -1]) if window < scores.shape[1] else torch.ones_like(wanted[:, 0])
    keep |= column == 0
    noise = _noise(token_ids.int(), keys)
    place = (some + noise).masked_fill_(~keep, -torch.inf).argmax(-1, keepdim=True)
    return token_ids.gather(1, place)[:, 0], enough


def _likeliest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """scores float32 `[N, vocab_size]` -> ids i64 `[N, count]` from likely to unlikely, ties by id: the id is a part of
    what is compared, because a device's order of equals is its own."""
    bits = (scores + 0.0).view(torch.int32)  # -0.0 is 0.0
    ordered = (bits ^ (bits.bitwise_right_shift(31) & 0x7FFFFFFF)).long()
    last = scores.shape[1] - 1
    keys = (ordered << 32) + torch.arange(last, -1, -1, device=scores.device)
    return last - (keys.topk(min(count, last + 1), -1).values & 0xFFFFFFFF)


def _read(
    packed: torch.Tensor,
    plan: SamplingPlan,
    logits: torch.Tensor,
    next_tokens: Sequence[NextToken],
    eos_token_ids: frozenset[int],
) -> Choices:
    """Waits for `packed`."""
    rows, reported, top = len(next_tokens), len(plan.reported), min(plan.top, logits.shape[1])
    host = packed.cpu()
    token_ids, sure, ids, values = host.split([rows, rows, reported * top, reported * (1 + top)])
    logprobs = values.view(torch.float32).view(reported, 1 + top).tolist()
    told = zip(ids.view(reported, top).tolist(), logprobs, strict=True)
    reports = dict(zip(plan.reported, told, strict=True))
    choices: Choices = []
    for row, token_id in enumerate(token_ids.tolist()):
        report = None
        if row in reports:
            (likely, (own, *others)), count = reports[row], plan.reported[row]
            report = TokenLogprob(token_id, own, tuple(zip(likely[:count], others[:count], strict=True)))
        choices.append(SampledToken(token_id, report))
    again = sorted({*plan.host, *(row for row, good in enumerate(sure.tolist()) if not good)})
    if again:
        redone = sample(torch.stack([logits[row] for row in again]), [next_tokens[row] for row in again], eos_token_ids)
        for row, choice in zip(again, redone, strict=True):
            choices[row] = choice
    return choices


def _noise(token_ids: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """token_ids i32 `[N, tokens]`, keys i64 `[2, N]`."""
    first, second = keys.int()[:, :, None]
    return gumbel_noise(token_ids, (first, second))


def with_noise(
    scores: torch.Tensor, peaks: torch.Tensor, temperatures: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """What the greatest of is chosen, `[N, vocab_size]`."""
    token_ids = torch.arange(scores.shape[1], dtype=torch.int32, device=scores.device)
    noise = _noise(token_ids.expand_as(scores), keys)
    hot = (temperatures > 0)[:, None]
    scaled = (scores - peaks[:, None]) / temperatures.where(temperatures > 0, 1)[:, None]
    return torch.where(hot, scaled + noise, scores)


def best_in_torch(
    scores: torch.Tensor, peaks: torch.Tensor, temperatures: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    return with_noise(scores, peaks, temperatures, keys).argmax(-1)


def keep_in_torch(scores: torch.Tensor, masks: torch.Tensor, rows: torch.Tensor) -> None:
    bits = masks[:, :, None] >> torch.arange(32, dtype=torch.int32, device=masks.device)
    banned = (bits & 1 == 0).flatten(1)[:, : scores.shape[1]]
    scores.index_copy_(0, rows, scores.index_select(0, rows).masked_fill_(banned, -torch.inf))


def tried_choices(device: torch.device, vocab_size: int) -> ChoiceKernels:
    """The quickest that are right there. A kernel is compiled for the size meanwhile."""
    return ChoiceKernels(tried_best(device, vocab_size), tried_keep(device, vocab_size))


def tried_best(device: torch.device, vocab_size: int) -> Best:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, vocab_size, generator=generator).mul_(3).to(torch.bfloat16).float()  # with equals
    keys = torch.tensor([noise_key(seed, 5) for seed in range(6)]).T
    temperatures = torch.tensor([0.0, 1.0, 0.5, 2.0, 1.0, 0.0])
    inputs = scores, scores.amax(-1), temperatures, keys
    exact = with_noise(*inputs).to(device)
    here = [x.contiguous().to(device) for x in inputs]

    def run(best: Best) -> torch.Tensor:
        return exact.gather(1, best(*here)[:, None])

    candidates: dict[str, Best] = {"Triton": OPS.best_token, "torch": best_in_torch}
    return first_right("noise over a vocabulary", candidates, run, exact.amax(-1, keepdim=True))[1]


def tried_keep(device: torch.device, vocab_size: int) -> Keep:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, vocab_size, generator=generator)
    words = torch.randint(-(2**63), 2**63 - 1, (2 * mask_words(vocab_size),), generator=generator)
    masks, rows = words.view(torch.int32).view(2, -1), torch.tensor([2, 0])

    def run(keep: Keep) -> torch.Tensor:
        made = scores.to(device, copy=True)
        keep(made, masks.to(device), rows.to(device))
        return made.clamp_min(-100.0)  # infinities have no difference

    expected = scores.clone()
    keep_in_torch(expected, masks, rows)
    candidates: dict[str, Keep] = {"Triton": OPS.mask_scores, "torch": keep_in_torch}
    return first_right("masks of grammars", candidates, run, expected.clamp_min(-100.0))[1]
