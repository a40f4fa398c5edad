"""The thinking budget, token by token: every branch of the reference's two phases, on a language model that says what a
script tells it and on a real one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from checkpoints import write_nvila_checkpoint

from siglane.config.vlm import Thinking
from siglane.engine.answers.thinking import ThinkingBudget, thinking_start
from siglane.engine.device import Computed, StepPlan
from siglane.engine.engine import Engine
from siglane.engine.process.load import build_engine
from siglane.errors import UserError
from siglane.families.model import VisionLanguageModel, load_model
from siglane.families.processor import Processor, load_processor
from siglane.lm.attention import SegmentAttention
from siglane.settings.engine import EngineConfig
from siglane.types import Finished, Prompt, Request, SamplingParams, TokenLogprob
from siglane.weights.hub import open_checkpoint

START, END = 200, 201
FORCED = (90, 91, 92, END, 93)
THINKING = Thinking(START, END, FORCED)
EOS, PAD = 320, 321  # both end an answer
TURN = (5, EOS, 6, 7)  # a user's turn, and what an answer follows
ANSWER = [30, 31, 32, EOS]

Says = Callable[[list[int]], int]


def thinker(thoughts: int | None) -> Says:
    """A model that thinks `thoughts` tokens beside its tags, None: for ever, and then gives ANSWER."""

    def says(output: list[int]) -> int:
        if END in output:
            # what a forced text has behind its tag is not the model's
            begun = [token for token in output[output.index(END) :] if token in ANSWER]
            return ANSWER[len(begun)]
        if not output:
            return START
        return END if len(output) - 1 == thoughts else 10 + len(output) % 50

    return says


def replies(*tokens: int) -> Says:
    """A model whose n-th token is `tokens[n]`, whatever was forced in between."""
    return lambda output: tokens[len(output)]


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    last: Finished | None = None

    @property
    def end(self) -> tuple[str | None, int | None]:
        assert self.last is not None
        return self.last.reason, self.last.matched_stop


@dataclass(frozen=True)
class Tiny:
    """A checkpoint with Qwen3's language model, loaded once."""

    model: VisionLanguageModel
    processor: Processor

    def engine(self, thinking: Thinking | None = THINKING, **options: object) -> Engine:
        config = EngineConfig(device="cpu", **{"kv_tokens": 4096, **options})  # type: ignore[arg-type]
        return Engine(self.model, config, (EOS, PAD), thinking)

    def scripted(self, says: Says, monkeypatch: pytest.MonkeyPatch, **options: object) -> Engine:
        """An engine whose language model says what it is told; everything around it is the real thing."""
        engine = self.engine(**options)

        def forward(plan: StepPlan) -> Computed:
            rows = [
                logits_of(says([*chunk.sequence.output_ids, *chunk.guesses[:count]]), engine)
                for chunk in plan.chunks
                for count in range(len(chunk.next_tokens))
            ]
            logits = torch.stack(rows) if rows else torch.empty(0, engine.runner.vocab_size)
            return Computed(logits, [()] * len(plan.chunks))

        monkeypatch.setattr(engine.runner, "forward", forward)
        return engine


def logits_of(token: int, engine: Engine) -> torch.Tensor:
    """`token` first, its neighbour second, all others far behind and in their order."""
    logits = -torch.arange(engine.runner.vocab_size, dtype=torch.float32) / 100 - 20
    logits[[token, token + 1]] = torch.tensor([2.0, 1.5])
    return logits


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("thinking") / "tiny"
    write_nvila_checkpoint(folder, qwen3=True)
    checkpoint = open_checkpoint(folder)
    processor = load_processor(checkpoint)
    return Tiny(load_model(checkpoint, processor.config, device="cpu", dtype=torch.float32), processor)


def request(name: str = "a", prompt: Sequence[int] = TURN, max_tokens: int = 100, **sampling: object) -> Request:
    return Request(name, Prompt(tuple(prompt)), SamplingParams(**sampling), max_tokens)  # type: ignore[arg-type]


def run(engine: Engine, *requests: Request) -> dict[str, Answer]:
    """Answers by request id; every one ends and leaves nothing behind."""
    answers = {one.request_id: Answer() for one in requests}
    for one in requests:
        engine.add(one)
    for _ in range(5000):
        if not engine.has_work:
            break
        for delta in engine.step():
            answer = answers[delta.request_id]
            answer.tokens += [] if delta.token_id is None else [delta.token_id]
            answer.logprobs += [] if delta.logprob is None else [delta.logprob]
            answer.last = delta.finished
    assert all(answer.last for answer in answers.values())
    stats = engine.stats()
    assert stats.pages_free + stats.pages_cached == stats.pages_total
    return answers


def thoughts(budget: int) -> list[int]:
    """The first tokens of a model that thinks for ever."""
    return [START, *(10 + number % 50 for number in range(1, budget))]


class TestBudget:
    @pytest.mark.parametrize("budget", [1, 2, 7])
    def test_a_spent_budget_is_followed_by_the_forced_ids_and_then_the_answer(
        self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, budget: int
    ) -> None:
        answer = run(tiny.scripted(thinker(None), monkeypatch), request(thinking_budget=budget))["a"]
        assert answer.tokens == [*thoughts(budget), *FORCED, *ANSWER]
        assert answer.end == ("stop", EOS)

    @pytest.mark.parametrize("budget", [3, 7, 12])
    def test_guesses_that_go_on_thinking_are_not_kept_beyond_it(
        self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, budget: int
    ) -> None:
        """The prompt holds the thoughts already, so that they are guessed, also where they are to be cut."""
        prompt = (*thoughts(30), *TURN)
        engine = tiny.scripted(thinker(None), monkeypatch)
        answer = run(engine, request(prompt=prompt, thinking_budget=budget, num_speculative_tokens=8))["a"]
        assert answer.tokens == [*thoughts(budget), *FORCED, *ANSWER]
        assert answer.last is not None
        assert answer.last.accepted_prediction_tokens >= budget - 2  # the first two are looked up

    @pytest.mark.parametrize("budget", [8, 9, 100, None])
    def test_thinking_that_closes_in_time_goes_on_as_if_there_were_no_budget(
        self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, budget: int | None
    ) -> None:
        """8 tokens up to and including `</think>`: with a budget of 8 it is just in time."""
        answer = run(tiny.scripted(thinker(6), monkeypatch), request(thinking_budget=budget))["a"]
        assert answer.tokens == [*thoughts(7), END, *ANSWER]

    def test_thinking_that_would_close_one_token_late_is_forced(
        self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answer = run(tiny.scripted(thinker(6), monkeypatch), request(thinking_budget=7))["a"]
        assert answer.tokens == [*thoughts(7), *FORCED, *ANSWER]

    def test_a_budget_does_not_ask_whether_the_answer_began_with_the_tag(
        self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = tiny.scripted(replies(40, 41, *[0] * 5, 42, PAD), monkeypatch)
        answer = run(engine, request(thinking_budget=2))["a"]
        assert answer.tokens == [40, 41, *FORCED, 42, PAD]

    @pytest.mark.parametrize("end", [EOS, PAD])
    def test_either_end_of_answer_ends_one_that_still_thinks(
        self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, end: int
    ) -> None:
        for budget in (3, 4):  # as its last token, and before
            answer = run(tiny.scripted(replies(START, 10, end), monkeypatch), request(thinking_budget=budget))["a"]
            assert (answer.tokens, answer.end) == ([START, 10, end], ("stop", end))

    def test_an_end_of_answer_that_is_ignored_does_not_end_the_thinking(
        self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = tiny.scripted(replies(START, EOS, 10, *[0] * 5, 42, EOS), monkeypatch)
        answer = run(engine, request(thinking_budget=3, ignore_eos=True, max_tokens=10))["a"]
        assert answer.tokens == [START, EOS, 10, *FORCED, 42, EOS]

    @pytest.mark.parametrize("room", range(3 + len(FORCED) + 2))
    def test_max_tokens_is_never_exceeded_and_counts_the_forced_ids(
        self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, room: int
    ) -> None:
        """Cut inside the thinking, before, inside and right behind the forced ids, and in the answer."""
        max_tokens = room + 1
        answer = run(tiny.scripted(thinker(None), monkeypatch), request(thinking_budget=3, max_tokens=max_tokens))["a"]
        assert answer.tokens == [*thoughts(3), *FORCED, *ANSWER][:max_tokens]
        assert answer.end == ("length", None)

    @pytest.mark.parametrize("budget", [6, 7, 1000])
    def test_a_budget_of_all_tokens_or_more_never_binds(
        self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, budget: int
    ) -> None:
        engine = tiny.scripted(thinker(None), monkeypatch)
        answer = run(engine, request(thinking_budget=budget, max_tokens=6))["a"]
        assert (answer.tokens, answer.end) == (thoughts(6), ("length", None))

    def test_the_context_ends_an_answer_among_forced_ids_too(self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = tiny.scripted(thinker(None), monkeypatch, kv_tokens=len(TURN) + 6, page_size=1)
        answer = run(engine, request(thinking_budget=3))["a"]
        assert (answer.tokens, answer.end) == ([*thoughts(3), *FORCED[:3]], ("length", None))


class TestPrompt:
    CLOSED, OPENED = (*TURN, START, 8, END, 8), (*TURN, START, 8)

    @pytest.mark.parametrize(
        ("prompt", "expected"),
        [
            (TURN, "free"),
            (OPENED, "opened"),
            (CLOSED, "closed"),
            ((*CLOSED, 30, *TURN), "free"),  # an earlier turn's tags
            ((*OPENED, 30, *TURN), "free"),
            ((*CLOSED, 30, *OPENED), "opened"),
            ((1, 2), "free"),
        ],
    )
    def test_what_a_prompt_says(self, prompt: tuple[int, ...], expected: str) -> None:
        assert thinking_start(prompt, THINKING, {EOS, PAD}) == expected

    def test_a_prompt_that_closed_the_thinking_has_no_budget(self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = tiny.scripted(replies(40, 41, 42, 43, EOS), monkeypatch)
        answer = run(engine, request(prompt=self.CLOSED, thinking_budget=2))["a"]
        assert answer.tokens == [40, 41, 42, 43, EOS]

    def test_a_prompt_that_opened_it_has_one(self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = tiny.scripted(replies(40, 41, *[0] * 5, 42, EOS), monkeypatch)
        answer = run(engine, request(prompt=self.OPENED, thinking_budget=2))["a"]
        assert answer.tokens == [40, 41, *FORCED, 42, EOS]


class TestRefusals:
    def test_a_model_that_does_not_reason_takes_no_budget(self, tiny: Tiny) -> None:
        engine = tiny.engine(thinking=None)
        with pytest.raises(UserError, match="does not reason") as raised:
            engine.add(request(thinking_budget=5))
        assert (raised.value.param, engine.has_work) == ("thinking_budget", False)

    @pytest.mark.parametrize("budget", [0, -1])
    def test_a_budget_leaves_something_to_think(self, tiny: Tiny, budget: int) -> None:
        with pytest.raises(UserError, match="enable_thinking=false turns thinking off"):
            tiny.engine().add(request(thinking_budget=budget))


class TestOtherParameters:
    """Forced ids are generated tokens like any others, except that they are not chosen."""

    def test_every_token_has_its_logprob(self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = tiny.scripted(thinker(None), monkeypatch)
        answer = run(engine, request(thinking_budget=2, logprobs=1))["a"]
        assert [one.token_id for one in answer.logprobs] == answer.tokens == [*thoughts(2), *FORCED, *ANSWER]
        for place, one in enumerate(answer.logprobs):
            wanted = thinker(None)(answer.tokens[:place])
            expected = torch.log_softmax(logits_of(wanted, engine), dim=-1)
            assert one.logprob == pytest.approx(float(expected[answer.tokens[place]]))
            assert one.top[0][0] == wanted  # what the model would have said

    def test_a_stop_token_ends_the_answer_where_it_is_forced_too(
        self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = tiny.scripted(thinker(None), monkeypatch)
        answer = run(engine, request(thinking_budget=2, stop_token_ids=(END,)))["a"]
        assert (answer.tokens, answer.end) == ([*thoughts(2), *FORCED[:4]], ("stop", END))

    def test_forced_ids_count_for_min_tokens(self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = tiny.scripted(replies(START, 10, *[0] * 5, EOS, EOS, EOS, EOS), monkeypatch)
        for least, expected in ((7, [EOS]), (9, [0, 0, EOS])):
            answer = run(engine, request(thinking_budget=2, min_tokens=least))["a"]
            assert answer.tokens == [START, 10, *FORCED, *expected]

    @pytest.mark.parametrize(
        "penalty", [{"presence_penalty": 1.0}, {"frequency_penalty": 1.0}, {"repetition_penalty": 2.0}]
    )
    def test_penalties_count_forced_ids(
        self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, penalty: dict[str, float]
    ) -> None:
        """The model would repeat 93, a forced id, and takes its neighbour instead; forced ids themselves stay."""
        engine = tiny.scripted(replies(START, 10, *[0] * 5, FORCED[-1], PAD), monkeypatch)
        answer = run(engine, request(thinking_budget=2, **penalty))["a"]
        assert answer.tokens == [START, 10, *FORCED, FORCED[-1] + 1, PAD]

    def test_a_seed_gives_the_same_answer_whatever_runs_beside(
        self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = tiny.scripted(thinker(None), monkeypatch)
        asked = [
            request(str(seed), thinking_budget=4, temperature=1.5, seed=seed, max_tokens=14, ignore_eos=True)
            for seed in range(3)
        ]
        together = {name: answer.tokens for name, answer in run(engine, *asked).items()}
        assert together == {one.request_id: run(engine, one)[one.request_id].tokens for one in asked}
        assert len({tuple(tokens) for tokens in together.values()}) == 3
        assert all(tokens[4:9] == list(FORCED) for tokens in together.values() if END not in tokens[:4])

    def test_requests_with_different_budgets_share_a_batch(self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = tiny.scripted(thinker(5), monkeypatch)
        budgets = {"none": None, "one": 1, "three": 3, "more": 50}
        answers = run(engine, *(request(name, thinking_budget=budget) for name, budget in budgets.items()))
        natural = [*thoughts(6), END, *ANSWER]
        assert {name: answer.tokens for name, answer in answers.items()} == {
            "none": natural,
            "one": [START, *FORCED, *ANSWER],
            "three": [*thoughts(3), *FORCED, *ANSWER],
            "more": natural,
        }


class TestTwoPhases:
    """The same tokens as the reference's two calls of a real model, however the engine cuts up its work."""

    BUDGET, MAX_TOKENS = 5, 16

    @torch.inference_mode()
    def generate(self, tiny: Tiny, known: list[int], count: int) -> list[int]:
        """Greedy tokens by computing everything again for each, up to `count` or an end of answer."""
        language, said = tiny.model.language, []
        while len(said) < count and not {EOS, PAD} & set(said):
            ids = torch.tensor([*known, *said])
            hidden = language(language.embed(ids), torch.arange(len(ids)), SegmentAttention([len(ids)]))
            best = language.logits(hidden[-1:])[0].topk(2)
            assert best.values[0] - best.values[1] > 1e-4, "too close to call; take another prompt"
            said.append(int(best.indices[0]))
        return said

    def reference(self, tiny: Tiny, prompt: Sequence[int]) -> list[int]:
        first = self.generate(tiny, list(prompt), self.BUDGET)
        if {EOS, PAD} & set(first):
            return first
        if END not in first:
            first += FORCED
        return first + self.generate(tiny, [*prompt, *first], self.MAX_TOKENS - len(first))

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"max_batch_tokens": 3},
            {"prefix_cache": False, "page_size": 1},
            {"page_size": 2, "kv_tokens": 40},  # two of the requests at a time, so that some are put back
        ],
        ids=["plain", "chunked", "no prefix cache", "preempted"],
    )
    def test_greedy_tokens(self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]) -> None:
        engine = tiny.engine(**options)
        preempted: list[int] = []
        put_back = engine.scheduler._preempt
        monkeypatch.setattr(
            engine.scheduler, "_preempt", lambda one: (preempted.append(len(one.output_ids)), put_back(one))
        )
        prompts = {str(seed): (40 + seed, 50, EOS, 6, 7 + seed, *range(60, 65)) for seed in range(4)}
        asked = [
            request(name, prompt, self.MAX_TOKENS, thinking_budget=self.BUDGET) for name, prompt in prompts.items()
        ]
        expected = {name: self.reference(tiny, prompt) for name, prompt in prompts.items()}
        assert sum(tokens[self.BUDGET :][: len(FORCED)] == list(FORCED) for tokens in expected.values()) >= 3
        for _ in range(2):  # again, with what the first time left in the prefix cache
            answers = run(engine, *asked)
            assert {name: answer.tokens for name, answer in answers.items()} == expected
        assert bool(preempted) == ("kv_tokens" in options)
        if preempted:
            assert any(self.BUDGET < length < self.BUDGET + len(FORCED) for length in preempted)

    def test_the_next_turn_finds_forced_ids_in_the_prefix_cache(self, tiny: Tiny) -> None:
        engine = tiny.engine(page_size=1)
        said = run(engine, request(max_tokens=self.MAX_TOKENS, thinking_budget=self.BUDGET))["a"].tokens
        longer = (*TURN, *said, 6, 7)
        again = run(engine, request("b", longer, max_tokens=1))["b"]
        assert again.tokens == self.generate(tiny, list(longer), 1)
        assert again.last is not None
        assert again.last.cached_tokens >= len(TURN) + len(said) - 1


def test_the_engine_takes_the_facts_from_its_processor(tmp_path: Path) -> None:
    write_nvila_checkpoint(tmp_path, qwen3=True)
    checkpoint = open_checkpoint(tmp_path)
    processor = load_processor(checkpoint)
    processor.config = replace(processor.config, thinking=THINKING)
    engine = build_engine(checkpoint, processor.config, processor.tokenizer, EngineConfig(device="cpu", kv_tokens=256))
    answer = run(engine, request(thinking_budget=3, max_tokens=8, ignore_eos=True))["a"]
    assert answer.tokens[3:] == list(FORCED)


def test_forced_ids_come_once_and_only_at_their_place() -> None:
    budget = ThinkingBudget(2, THINKING)
    output: list[int] = [START, 10]
    while (token := budget.forced_id(output)) is not None:
        output.append(token)
    assert output == [START, 10, *FORCED]
    assert [budget.forced_id(one) for one in ([], [START], [START, END], [*output, 30, 31])] == [None] * 4
