"""Sampling against references written out in plain Python: what may be chosen, how often, and by whom it is decided."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from engine_kit import Asked, image, prompt
from hypothesis import given, settings
from hypothesis import strategies as st

from siglane.engine.batch import Sequence as Running
from siglane.engine.edits import Edits
from siglane.engine.sampling.noise import gumbel_noise, noise_key
from siglane.engine.sampling.sampler import WINDOW, Likeliest, SampledToken, contenders, draw, filtered, sample
from siglane.errors import EngineError
from siglane.types import SamplingParams

EOS = frozenset({3})
EXPECTED_KEY = (-1980219914, -30470015)
EXPECTED_NOISE = [0.189166, -0.194295, 0.883090, 0.0653254]
LOGITS = torch.tensor([2.0, 1.5, 0.5, 2.5, -1.0, 0.0, 1.0, -3.0])
TOKENS = len(LOGITS)


def running(asked: Asked | None = None, answered: tuple[int, ...] = (), order: int = 0, **sampling: object) -> Running:
    """A request that has answered so far."""
    params = SamplingParams(**sampling)  # type: ignore[arg-type]
    sequence = Running.of((asked or prompt(5, 6)).request("r", params, 100), order, params.seed or 0)
    for token_id in answered:
        sequence.append(token_id)
    return sequence


def choose(logits: torch.Tensor, sequence: Running, eos: frozenset[int] = EOS) -> SampledToken:
    (choice,) = sample(logits[None], [sequence.next_token()], eos)
    assert isinstance(choice, SampledToken), choice
    return choice


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    top = max(logits)
    powers = [math.exp((one - top) / temperature) for one in logits]
    whole = sum(powers)
    return [power / whole for power in powers]


def defined(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """What may be chosen, with what probability: top-k, then top-p among those, then min-p; one always stays."""
    probabilities = softmax(logits, temperature)
    order = sorted(range(len(logits)), key=lambda token_id: (-probabilities[token_id], token_id))
    if top_k > 0:
        order = order[:top_k]
    if top_p < 1:
        mass, whole, kept = 0.0, sum(probabilities[i] for i in order), []
        for token_id in order:
            if kept and mass >= top_p * whole:
                break
            kept.append(token_id)
            mass += probabilities[token_id]
        order = kept
    floor = min_p * max(probabilities)
    order = [token_id for token_id in order if probabilities[token_id] >= floor] or order[:1]
    total = sum(probabilities[token_id] for token_id in order)
    return {token_id: probabilities[token_id] / total for token_id in order}


def check_filter(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    found = probabilities(torch.tensor(logits), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = {i: value for i, value in defined(logits, temperature, top_k, top_p, min_p).items() if value > 1e-9}
    assert {i for i in found if found[i] > 1e-9} == set(expected)
    assert all(found[i] == pytest.approx(expected[i], rel=1e-3, abs=1e-6) for i in expected)


def left(logits: torch.Tensor, temperature: float = 1.0, **filters: float) -> Likeliest:
    """What the filters leave."""
    params = SamplingParams(temperature=temperature, **filters)  # type: ignore[arg-type]
    return filtered((logits - logits.max()) / temperature, params)


def probabilities(logits: torch.Tensor, temperature: float = 1.0, **filters: float) -> dict[int, float]:
    token_ids, scores = left(logits, temperature, **filters)
    return dict(zip(token_ids.tolist(), scores.softmax(0).tolist(), strict=True))


class TestGreedy:
    def test_the_likeliest_token_is_taken(self) -> None:
        assert choose(LOGITS, running()) == SampledToken(3, None)

    def test_of_equal_tokens_always_the_first(self) -> None:
        tied = torch.tensor([1.0, 4.0, 4.0, 4.0])
        assert choose(tied, running()).token_id == 1
        assert choose(tied, running(logprobs=1)).token_id == 1

    @pytest.mark.parametrize("options", [{"logprobs": 0}, {"min_tokens": 0, "presence_penalty": 1e-9}])
    def test_the_short_way_and_the_long_way_agree(self, options: dict[str, object]) -> None:
        assert choose(LOGITS, running(**options)).token_id == choose(LOGITS, running()).token_id

    @pytest.mark.parametrize("temperature", [1e-8, 1e-30, 5e-324])
    def test_a_tiny_temperature_is_greedy_and_does_not_overflow(self, temperature: float) -> None:
        logits = LOGITS * 1e4
        assert {choose(logits, running(temperature=temperature, seed=seed)).token_id for seed in range(20)} == {3}


class TestFilters:
    """Exact: the set that may be chosen and its probabilities, so no statistics are needed."""

    @given(
        counts=st.lists(st.integers(1, 40), min_size=1, max_size=12, unique=True),
        temperature=st.sampled_from([0.3, 1.0, 1.7]),
        top_k=st.integers(-1, 13),
        top_p=st.sampled_from([0.0, 0.1, 0.5, 0.93, 1.0]),
        min_p=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    )
    @settings(deadline=None, max_examples=100)
    def test_any_mix_of_filters_keeps_what_the_definition_keeps(
        self, counts: list[int], temperature: float, top_k: int, top_p: float, min_p: float
    ) -> None:
        """Roots keep every probability off every threshold, so that rounding decides nothing."""
        logits = [temperature * math.log(count + 0.1 * math.sqrt(root)) for root, count in enumerate(counts, start=2)]
        check_filter(logits, temperature, top_k, top_p, min_p)

    @pytest.mark.parametrize(
        ("params", "kept"),
        [
            ({"top_k": 3}, {0, 1, 3}),
            ({"top_k": 1}, {3}),
            ({"top_k": 100}, set(range(TOKENS))),
            ({"top_k": -1}, set(range(TOKENS))),
            ({"top_p": 0.0}, {3}),
            ({"top_p": 0.5}, {0, 3}),
            ({"min_p": 1.0}, {3}),
            ({"min_p": 0.3}, {0, 1, 3}),
            ({"top_k": 2, "top_p": 0.6}, {3}),
        ],
    )
    def test_each_filter_by_itself(self, params: dict[str, float], kept: set[int]) -> None:
        assert set(left(LOGITS, **params).token_ids.tolist()) == kept

    @pytest.mark.parametrize("tokens", [200, 50 * WINDOW])
    @pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 1.5}, {"top_k": 3, "top_p": 0.6}])
    def test_ties_are_broken_by_token_id(self, tokens: int, filters: dict[str, float]) -> None:
        """A top_p above 1 stands for so many tokens."""
        filters = {name: value / tokens if value == 1.5 else value for name, value in filters.items()}
        assert left(torch.zeros(tokens), **filters).token_ids.tolist() == [0, 1]

    @pytest.mark.parametrize(
        ("spread", "top_p", "beyond"), [(0.01, 0.01, False), (0.01, 0.9, True), (5.0, 0.9, False), (3.0, 0.999, True)]
    )
    def test_a_vocabulary_larger_than_the_window_is_filtered_exactly(
        self, spread: float, top_p: float, beyond: bool
    ) -> None:
        """Whether top-p finds its mass among the likeliest or needs more of them."""
        logits = torch.randn(50 * WINDOW, generator=torch.Generator().manual_seed(1)) * spread
        kept = set(left(logits, top_p=top_p).token_ids.tolist())
        expected = set(defined(logits.tolist(), 1.0, 0, top_p, 0.0))
        assert len(kept ^ expected) <= 1e-4 * len(logits)  # where float32 and float64 see the border
        assert (len(kept) > WINDOW) == beyond

    @pytest.mark.parametrize(
        "filters", [{"top_p": 0.8}, {"top_k": 3}, {"top_k": 50}, {"min_p": 0.1}, {"top_p": 0.99999}]
    )
    def test_what_a_grammar_leaves_is_filtered_without_the_rest(self, filters: dict[str, float]) -> None:
        """Five tokens of very many may come."""
        logits, few = torch.full((50 * WINDOW,), -torch.inf), [3, 700, 701, 30_000, 50 * WINDOW - 1]
        logits[few] = torch.tensor([1.0, 2.0, 0.5, 1.5, -1.0])
        expected = defined(
            logits[few].tolist(), **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **filters}
        )  # type: ignore[arg-type]
        assert left(logits, **filters).token_ids.tolist() == [few[place] for place in expected]

    @pytest.mark.parametrize("top_k", [1, 20, WINDOW, WINDOW + 1, 5000])
    def test_top_k_takes_the_first_of_a_whole_sort(self, top_k: int) -> None:
        logits = torch.randint(0, 400, (50 * WINDOW + 7,), generator=torch.Generator().manual_seed(1)).float()
        order = logits.sort(descending=True, stable=True).indices
        assert left(logits, top_k=top_k).token_ids.tolist() == order[:top_k].tolist()


class TestDistribution:
    @pytest.mark.few("params0", "params3", "params5")
    @pytest.mark.parametrize(
        "params", [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"temperature": 0.5}, {"temperature": 2.0}]
    )
    def test_tokens_come_as_often_as_their_probability_says(self, params: dict[str, float]) -> None:
        whole = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **params}
        expected = defined(LOGITS.tolist(), **whole)  # type: ignore[arg-type]
        draws = 600
        asked = SamplingParams(**whole)  # type: ignore[arg-type]
        counts = Counter(draw(LOGITS, asked, noise_key(7, place)) for place in range(draws))
        assert set(counts) <= set(expected)
        for token_id, probability in expected.items():
            deviation = math.sqrt(draws * probability * (1 - probability))
            assert abs(counts[token_id] - draws * probability) <= 4.5 * deviation + 1

    @pytest.mark.parametrize("keys", [[(7, place) for place in range(100_000)], [(seed, 3) for seed in range(100_000)]])
    def test_a_hundred_thousand_draws_pass_a_chi_square(self, keys: list[tuple[int, int]]) -> None:
        """Over the places of one answer, and over seeds that follow each other. 99.9 % of true draws stay below."""
        first, second = torch.tensor([noise_key(*key) for key in keys], dtype=torch.int32).T[:, :, None]
        noise = gumbel_noise(torch.arange(TOKENS, dtype=torch.int32), (first, second))
        counts = (LOGITS + noise).argmax(-1).bincount(minlength=TOKENS).tolist()
        expected = [len(keys) * probability for probability in softmax(LOGITS.tolist())]
        assert sum((count - mean) ** 2 / mean for count, mean in zip(counts, expected, strict=True)) < 24.32

    def test_noise_of_neighbouring_tokens_and_places_is_unrelated(self) -> None:
        noise = torch.stack([gumbel_noise(torch.arange(50_000, dtype=torch.int32), noise_key(1, n)) for n in range(4)])
        rows = torch.cat((noise, noise.roll(1, 1)))
        assert noise.mean(1).tolist() == pytest.approx([0.5772] * 4, abs=0.03)
        assert noise.std(1).tolist() == pytest.approx([1.2825] * 4, abs=0.03)
        assert (torch.corrcoef(rows) - torch.eye(8)).abs().max() < 0.03

    def test_what_cannot_win_is_left_out_and_nothing_else(self) -> None:
        """A peaked row's few candidates against noise for its whole vocabulary."""
        logits = torch.randn(40_000, generator=torch.Generator().manual_seed(3)) * 8
        every = torch.arange(len(logits), dtype=torch.int32)
        params = SamplingParams(temperature=2.0)
        for place in range(50):
            key = noise_key(5, place)
            expected = ((logits - logits.max()) / 2 + gumbel_noise(every, key)).argmax()
            assert draw(logits, params, key) == int(expected)

    @pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 3.0, 8.0])
    def test_who_wins_is_found_without_all_noise(self, spread: float) -> None:
        """One, and the first sixteen, as among noise for every token; a third of them are banned."""
        logits = (torch.randn(40_000, generator=torch.Generator().manual_seed(3)) * spread).to(torch.bfloat16).float()
        logits[::3] = -torch.inf
        scores, every = logits - logits.max(), torch.arange(len(logits), dtype=torch.int32)
        for place in range(20):
            key = noise_key(6, place)
            values = scores + gumbel_noise(every, key)
            assert draw(logits, SamplingParams(temperature=1.0), key) == int(values.argmax())
            token_ids, found = contenders(scores, key, 16)
            assert token_ids.tolist() == (values >= found.min()).nonzero()[:, 0].tolist()
            assert torch.equal(found, values[token_ids])
            assert len(found) >= 16

    @pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 2.0])
    @pytest.mark.parametrize(
        "filters",
        [{"top_p": 0.9}, {"top_p": 0.1}, {"min_p": 0.01}, {"top_p": 0.7, "min_p": 0.001}, {"top_p": 0.999999}],
    )
    def test_filters_that_leave_very_many_need_no_sort(self, spread: float, filters: dict[str, float]) -> None:
        """The same token as among all that they leave, in their order."""
        logits = (torch.randn(50 * WINDOW, generator=torch.Generator().manual_seed(4)) * spread).to(torch.bfloat16)
        scores = logits.float() - logits.float().max()
        params = SamplingParams(temperature=1.0, **filters)  # type: ignore[arg-type]
        token_ids, some = filtered(scores, params)
        for place in range(10):
            key = noise_key(7, place)
            expected = token_ids[(some + gumbel_noise(token_ids.int(), key)).argmax()]
            assert draw(logits.float(), params, key) == int(expected)

    def test_noise_is_the_same_on_every_machine_and_day(self) -> None:
        """Words of 32 bits that wrap: a device that computes otherwise would tell other stories."""
        noise = gumbel_noise(torch.tensor([0, 1, 2, 151_935], dtype=torch.int32), noise_key(42, 7))
        assert noise_key(42, 7) == EXPECTED_KEY
        assert noise.tolist() == pytest.approx(EXPECTED_NOISE, rel=1e-5)


def penalised(token_id: int, asked: list[int], answered: list[int], params: SamplingParams) -> float:
    """vLLM's definitions, for one token of LOGITS."""
    value = float(LOGITS[token_id]) + sum(bias for one, bias in params.logit_bias if one == token_id)
    if len(answered) < params.min_tokens and token_id in EOS | set(params.stop_token_ids):
        value = -math.inf
    if token_id in {*asked, *answered}:
        value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
    times = answered.count(token_id)
    return value - params.frequency_penalty * times - params.presence_penalty * (times > 0)


class TestAdjustments:
    @given(
        answered=st.lists(st.integers(0, TOKENS - 1), max_size=8),
        repetition=st.sampled_from([1.0, 0.5, 1.3]),
        frequency=st.sampled_from([0.0, 0.4, -0.7]),
        presence=st.sampled_from([0.0, 1.1, -0.6]),
        bias=st.dictionaries(st.integers(0, TOKENS - 1), st.sampled_from([-100.0, -2.0, 1.5, 100.0]), max_size=3),
        min_tokens=st.integers(0, 4),
        stops=st.lists(st.integers(0, TOKENS - 1), max_size=2),
    )
    @settings(deadline=None, max_examples=100)
    def test_penalties_bias_and_minimum_length_add_up_as_defined(
        self,
        answered: list[int],
        repetition: float,
        frequency: float,
        presence: float,
        bias: dict[int, float],
        min_tokens: int,
        stops: list[int],
    ) -> None:
        sequence = running(
            prompt(5, 0, 6, 6),
            tuple(answered),
            repetition_penalty=repetition,
            frequency_penalty=frequency,
            presence_penalty=presence,
            logit_bias=tuple(bias.items()),
            min_tokens=min_tokens,
            stop_token_ids=tuple(stops),
        )
        params = sequence.request.sampling
        expected = [penalised(token_id, [5, 0, 6, 6], answered, params) for token_id in range(TOKENS)]
        edits = Edits.of(params, sequence.answered, sequence.tally, EOS)
        found = LOGITS if edits is None else edits.applied(LOGITS)
        assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
        if max(expected) - sorted(expected)[-2] > 1e-4:
            assert choose(LOGITS, sequence).token_id == expected.index(max(expected))

    def test_the_end_comes_only_after_min_tokens(self) -> None:
        assert choose(LOGITS, running(answered=(1, 1), min_tokens=3)).token_id == 0
        assert choose(LOGITS, running(answered=(1, 1, 1), min_tokens=3)).token_id == 3

    def test_stop_token_ids_count_as_ends(self) -> None:
        assert choose(LOGITS, running(min_tokens=1, stop_token_ids=(0,))).token_id == 1

    def test_ends_outside_the_vocabulary_are_nobodys_business(self) -> None:
        chosen = choose(LOGITS, running(min_tokens=1, stop_token_ids=(TOKENS, 10**9)), frozenset({3, 10**6}))
        assert chosen.token_id == 0

    def test_placeholders_outside_the_vocabulary_are_not_penalised(self) -> None:
        asked = prompt(-200, 7, 99, 10**6)
        assert choose(LOGITS, running(asked, repetition_penalty=2.0)).token_id == 3
        assert choose(LOGITS, running(prompt(99), repetition_penalty=2.0)).token_id == 3
        # the last token of the vocabulary is not the one that -1 would mean
        favoured = LOGITS.clone()
        favoured[-1] = 3.0
        assert choose(favoured, running(prompt(-1), repetition_penalty=9.0)).token_id == TOKENS - 1

    def test_an_image_in_the_prompt_is_no_obstacle(self) -> None:
        asked = prompt(0, image(1), 3)
        assert choose(LOGITS, running(asked, repetition_penalty=2.0)).token_id == 1


class TestSeeds:
    def draws(self, sequence: Running, before: int = 0, after: int = 0) -> list[int]:
        """Ten tokens of `sequence`, between neighbours that draw too."""
        tokens = []
        for _ in range(10):
            rows = [running(temperature=2.0, seed=90 + n) for n in range(before)]
            rows += [sequence, *(running(temperature=0.0) for _ in range(after))]
            choice = sample(LOGITS.repeat(len(rows), 1), [row.next_token() for row in rows], EOS)[before]
            assert isinstance(choice, SampledToken)
            sequence.append(choice.token_id)
            tokens.append(choice.token_id)
        return tokens

    def test_a_seed_decides_whatever_runs_beside(self) -> None:
        alone = self.draws(running(temperature=1.0, seed=5))
        assert alone == self.draws(running(temperature=1.0, seed=5))
        assert alone == self.draws(running(temperature=1.0, seed=5), before=3)
        assert alone == self.draws(running(temperature=1.0, seed=5), before=1, after=4)

    def test_a_place_has_the_same_noise_again(self) -> None:
        """A step that is computed twice, as after a preemption, chooses the same."""
        sequence = running(temperature=2.0, seed=5)
        assert len({choose(LOGITS, sequence).token_id for _ in range(10)}) == 1

    def test_another_seed_decides_otherwise(self) -> None:
        assert len({tuple(self.draws(running(temperature=1.0, seed=seed))) for seed in range(8)}) == 8


class TestLogprobs:
    def test_they_are_the_models_own_before_any_adjustment(self) -> None:
        expected = [math.log(value) for value in softmax(LOGITS.tolist())]
        chosen = choose(LOGITS, running(logprobs=3, logit_bias=((5, 100.0),), temperature=0.0))
        assert chosen.token_id == 5
        assert chosen.logprob is not None
        assert chosen.logprob.token_id == 5
        assert chosen.logprob.logprob == pytest.approx(expected[5], abs=1e-6)
        assert [token_id for token_id, _ in chosen.logprob.top] == [3, 0, 1]
        assert [value for _, value in chosen.logprob.top] == pytest.approx([expected[i] for i in (3, 0, 1)], abs=1e-6)

    def test_zero_alternatives_give_the_chosen_one_only(self) -> None:
        logprob = choose(LOGITS, running(logprobs=0)).logprob
        assert logprob is not None
        assert logprob.top == ()

    def test_more_alternatives_than_tokens_give_all_tokens(self) -> None:
        logprob = choose(LOGITS, running(logprobs=1000)).logprob
        assert logprob is not None
        assert len(logprob.top) == TOKENS
        assert sum(math.exp(value) for _, value in logprob.top) == pytest.approx(1)

    def test_nobody_gets_them_unasked(self) -> None:
        assert choose(LOGITS, running(temperature=1.0)).logprob is None

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_logits_are_widened_first(self, dtype: torch.dtype) -> None:
        narrow = LOGITS.to(dtype)
        logprob = choose(narrow, running(logprobs=0)).logprob
        assert logprob is not None
        assert logprob.logprob == pytest.approx(math.log(softmax(narrow.double().tolist())[3]), abs=1e-6)


class TestFaults:
    @pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}, {"logprobs": 2}])
    def test_a_row_that_is_not_finite_fails_alone(self, poison: float, options: dict[str, object]) -> None:
        logits = LOGITS.repeat(3, 1)
        logits[1, 4] = poison
        rows = [running(**options) for _ in range(3)]
        first, broken, last = sample(logits, [row.next_token() for row in rows], EOS)
        assert isinstance(broken, EngineError)
        assert broken.code == "engine_nan"
        assert first == last == choose(LOGITS, running(**options))

    def test_a_request_whose_choice_fails_fails_alone(self) -> None:
        """No validated request gets here; a bug in one feature must still not take the batch."""
        hopeless = tuple((token_id, -math.inf) for token_id in range(TOKENS))
        rows = [running(temperature=1.0, seed=1), running(temperature=1.0, logit_bias=hopeless)]
        good, broken = sample(LOGITS.repeat(2, 1), [row.next_token() for row in rows], EOS)
        assert isinstance(broken, EngineError)
        assert good == choose(LOGITS, running(temperature=1.0, seed=1))
