"""Choices made where the logits lie are those of the host: the same tokens, the same log-probabilities, one read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from engine_kit import prompt
from test_sampler import EOS, running

from siglane.engine.batch import NextToken
from siglane.engine.batch import Sequence as Running
from siglane.engine.constraints.constraint import Words, mask_words, unpacked
from siglane.engine.sampling import cuda as sampler_cuda
from siglane.engine.sampling import plan as sampler_plan
from siglane.engine.sampling.cuda import ChoiceKernels, DeviceSampler, best_in_torch, keep_in_torch, tried_choices
from siglane.engine.sampling.plan import PAIRS, SamplingPlan
from siglane.engine.sampling.sampler import WINDOW, Choices, SampledToken, sample
from siglane.errors import EngineError

VOCABULARY = 20 * WINDOW + 3
CPU = torch.device("cpu")
KERNELS = ChoiceKernels(best_in_torch, keep_in_torch)

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "hot": {"temperature": 1.0, "seed": 1},
    "cold": {"temperature": 1e-30, "seed": 2},
    "top-k": {"temperature": 1.0, "top_k": 5, "seed": 3},
    "top-p": {"temperature": 0.7, "top_p": 0.9, "seed": 4},
    "nothing but the first": {"temperature": 1.0, "top_p": 0.0, "seed": 5},
    "min-p": {"temperature": 1.3, "min_p": 0.02, "seed": 6},
    "all filters": {"temperature": 1.0, "top_k": 50, "top_p": 0.8, "min_p": 0.001, "seed": 7},
    "log-probabilities": {"temperature": 1.0, "logprobs": 3, "seed": 8},
    "its own": {"logprobs": 0},
    "bias": {"logit_bias": ((5, 100.0), (VOCABULARY - 1, 3.0), (5, -2.5)), "logprobs": 2},
    "penalties": {
        "temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": -0.2, "seed": 9,
    },
    "too early": {"min_tokens": 9, "stop_token_ids": (0, 1), "temperature": 2.0, "seed": 10},
    "needs more than a window": {"temperature": 2.0, "top_p": 0.9999, "seed": 11},
    "a wide top-k": {"temperature": 1.0, "top_k": WINDOW + 1, "seed": 12},
}  # fmt: skip


def rows() -> list[Running]:
    return [
        running(prompt(5, 0, 6, -200, VOCABULARY), (7, 7, 8), order, **kind)
        for order, kind in enumerate(KINDS.values())
    ]


def logits(seed: int = 0) -> torch.Tensor:
    """Rounded, so that many are equal."""
    made = torch.randn(len(KINDS), VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 4
    return made.to(torch.bfloat16)


def on_device(logits: torch.Tensor, next_tokens: Sequence[NextToken]) -> Choices:
    return DeviceSampler(64, CPU, KERNELS)(logits, next_tokens, EOS)()


def equal(ours: SampledToken | EngineError, expected: SampledToken | EngineError) -> None:
    assert isinstance(ours, SampledToken)
    assert isinstance(expected, SampledToken)
    assert ours.token_id == expected.token_id
    assert (ours.logprob is None) == (expected.logprob is None)
    if ours.logprob is not None and expected.logprob is not None:
        assert ours.logprob.logprob == pytest.approx(expected.logprob.logprob, abs=1e-5)
        assert [one for one, _ in ours.logprob.top] == [one for one, _ in expected.logprob.top]
        values = [[value for _, value in one.logprob.top] for one in (ours, expected) if one.logprob]
        assert values[0] == pytest.approx(values[1], abs=1e-5)


def test_every_kind_of_request_gets_the_hosts_choice() -> None:
    for seed in range(6):
        steps = [row.next_token() for row in rows()]
        for ours, expected in zip(on_device(logits(seed), steps), sample(logits(seed), steps, EOS), strict=True):
            equal(ours, expected)


def test_a_row_alone_is_the_same_beside_others() -> None:
    steps, scores = [row.next_token() for row in rows()], logits()
    together = on_device(scores, steps)
    for row, step in enumerate(steps):
        assert on_device(scores[row : row + 1], [step]) == [together[row]]


def test_what_the_host_has_to_do_is_what_cannot_be_done_there(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counting(monkeypatch)
    on_device(logits(), [row.next_token() for row in rows()])
    assert seen == [2]  # the last two kinds
    on_device(logits()[:-2], [row.next_token() for row in rows()[:-2]])
    assert seen == [2]


def test_a_forced_token_is_taken_and_reported() -> None:
    step = running(temperature=1.0, logprobs=1)
    forced = step.next_token()._replace(forced_id=17)
    equal(*on_device(logits()[:1], [forced]), *sample(logits()[:1], [forced], EOS))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_fails_alone(poison: float) -> None:
    scores, steps = logits(), [row.next_token() for row in rows()]
    expected = on_device(scores, steps)
    for broken in (0, 1, 8):
        worse = scores.clone()
        worse[broken, 4] = poison
        found = on_device(worse, steps)
        assert isinstance(found[broken], EngineError)
        assert found[:broken] + found[broken + 1 :] == expected[:broken] + expected[broken + 1 :]


def test_penalties_of_long_prompts_are_the_hosts() -> None:
    """There is room for so many pairs."""
    long = prompt(*range(PAIRS // 2))
    steps = [running(long, (3,), temperature=1.0, repetition_penalty=1.1, seed=1).next_token() for _ in range(2)]
    scores = logits()[:2].repeat(1, 3)
    for ours, expected in zip(on_device(scores, steps), sample(scores, steps, EOS), strict=True):
        equal(ours, expected)


def test_a_sampler_is_used_again_while_its_first_step_waits() -> None:
    sampler, scores, steps = DeviceSampler(64, CPU, KERNELS), logits(), [row.next_token() for row in rows()]
    first = sampler(scores, steps, EOS)
    other = [step._replace(seed=step.seed + 100) for step in steps]
    second = sampler(scores, other, EOS)
    assert first() == on_device(scores, steps)
    assert second() == on_device(scores, other)


def test_a_vocabulary_smaller_than_the_window_needs_no_host() -> None:
    steps = [replace_vocabulary(row) for row in rows() if not row.request.sampling.logit_bias]
    scores = torch.randn(len(steps), 40)
    for ours, expected in zip(on_device(scores, steps), sample(scores, steps, EOS), strict=True):
        equal(ours, expected)


def replace_vocabulary(row: Running) -> NextToken:
    params = replace(row.request.sampling, logprobs=2)
    return row.next_token()._replace(request=replace(row.request, sampling=params))


def test_without_a_gpu_torch_is_left() -> None:
    assert tried_choices(CPU, 9_001) == KERNELS


def test_sixty_four_hot_rows_have_the_frequencies_of_their_softmax() -> None:
    """1,600 draws of each token's probability by one row's places."""
    scores, row = torch.tensor([2.0, 1.5, 0.5, 2.5, -1.0, 0.0, 1.0, -3.0]), running(temperature=1.0, seed=7)
    counts = torch.zeros(8)
    for start in range(0, 25_600, 64):
        steps = [row.next_token()._replace(answered=start + place) for place in range(64)]
        for choice in on_device(scores.repeat(64, 1), steps):
            assert isinstance(choice, SampledToken)
            counts[choice.token_id] += 1
    means = scores.softmax(0) * counts.sum()
    assert float(((counts - means) ** 2 / means).sum()) < 24.32  # 99.9 % of true draws stay below


@dataclass
class Held:
    """Stands for a place in a grammar: the tokens that may come there, or why it cannot say."""

    ids: Sequence[int] | None
    error: EngineError | None = None

    def mask(self, guesses: Sequence[int] = ()) -> Words | None:
        if self.error is not None:
            raise self.error
        if self.ids is None:
            return None
        bits = np.zeros(mask_words(VOCABULARY) * 64, np.uint8)
        bits[list(self.ids)] = 1
        return np.packbits(bits, bitorder="little").view(np.int64)

    def allowed(self, guesses: Sequence[int] = ()) -> Any:
        mask = self.mask(guesses)
        return None if mask is None else unpacked(mask, VOCABULARY)


PLACES = (
    Held(range(3, VOCABULARY, 7)),
    Held([VOCABULARY - 1]),
    Held([0, 63, 64, 127, 128]),
    Held(None),
    Held(range(VOCABULARY)),
    Held([31, 32]),
)


def held(place: Held, step: NextToken) -> NextToken:
    return step._replace(constrained=place)  # type: ignore[arg-type]


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that the host is asked about, a number for each time."""
    seen: list[int] = []

    def counted(logits: torch.Tensor, next_tokens: Sequence[NextToken], eos: frozenset[int]) -> Choices:
        seen.append(len(next_tokens))
        return sample(logits, next_tokens, eos)

    monkeypatch.setattr(sampler_cuda, "sample", counted)
    return seen


@pytest.mark.parametrize("place", range(len(PLACES)))
def test_rows_under_a_grammar_get_the_hosts_choice_without_the_host(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of request, half of them held; some of what is allowed is banned by the request itself."""
    kinds = [row.next_token() for row in rows()[:-2]]
    steps = [held(PLACES[place], step) if number % 2 else step for number, step in enumerate(kinds)]
    steps += [held(PLACES[place], step) for step in kinds]
    scores = torch.cat((logits()[:-2], logits(1)[:-2]))
    expected = sample(scores, steps, EOS)
    seen = counting(monkeypatch)
    for ours, other in zip(on_device(scores, steps), expected, strict=True):
        equal(ours, other)
    assert seen == []


def test_a_place_where_the_request_bans_all_that_may_come_is_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """An end is too early, and the grammar has nothing else."""
    early = running(min_tokens=9, stop_token_ids=(5,), temperature=1.0, seed=1).next_token()
    steps = [held(Held([3, 5]), early), running().next_token()]
    expected = sample(logits()[:2], steps, EOS)
    seen = counting(monkeypatch)
    for ours, other in zip(on_device(logits()[:2], steps), expected, strict=True):
        equal(ours, other)
    assert seen == [1]


def test_a_grammar_that_fails_ends_its_own_row() -> None:
    error = EngineError("the answer's grammar is too complex", code="grammar_too_complex", status=400)
    steps = [row.next_token() for row in rows()]
    expected = on_device(logits(), steps)
    found = on_device(logits(), [held(Held((), error), steps[0]), *steps[1:]])
    assert found == [error, *expected[1:]]


def test_more_masks_than_there_is_room_for_are_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_plan, "MASK_WORDS", 2 * mask_words(VOCABULARY) + 1)
    steps = [held(PLACES[0], row.next_token()) for row in rows()[:4]]
    assert SamplingPlan.of(steps, EOS, VOCABULARY).host == [2, 3]
    for ours, other in zip(on_device(logits()[:4], steps), sample(logits()[:4], steps, EOS), strict=True):
        equal(ours, other)


def test_a_forced_token_asks_no_grammar() -> None:
    error = EngineError("is not asked")
    forced = held(Held((), error), running().next_token())._replace(forced_id=17)
    equal(*on_device(logits()[:1], [forced]), *sample(logits()[:1], [forced], EOS))
