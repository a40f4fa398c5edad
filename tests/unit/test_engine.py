"""The engine on a tiny checkpoint: the same tokens however the work is cut up, and a fault stays with its request.

The reference is the same modules without cache, pages, chunks or batches: everything is computed again for each token.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine_kit import Asked

from siglane.engine.batch import Sequence as Running
from siglane.engine.device import Computed, StepPlan
from siglane.engine.engine import Engine
from siglane.engine.lookup import Lookup
from siglane.engine.process.load import load_engine, placement
from siglane.errors import EngineError, UserError
from siglane.families.model import VisionLanguageModel, load_model
from siglane.families.processor import Processor, load_processor
from siglane.lm.attention import SegmentAttention
from siglane.settings.engine import EngineConfig
from siglane.types import (
    DecodedImage,
    Finished,
    ImagePart,
    ImagePatches,
    ImageTokens,
    Message,
    Prompt,
    Read,
    Readout,
    Request,
    SamplingParams,
    TokenDelta,
)
from siglane.weights.hub import open_checkpoint

ANSWER = 6  # tokens; random weights rarely end an answer by themselves, and ignore_eos makes sure
WIDE, SQUARE = (130, 70), (56, 56)  # several tiles and a thumbnail; one tile


@dataclass(frozen=True)
class Tiny:
    """A checkpoint of a few thousand parameters, loaded once."""

    folder: Path
    model: VisionLanguageModel
    processor: Processor
    answers: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    def engine(self, model: VisionLanguageModel | None = None, **options: object) -> Engine:
        config = EngineConfig(device="cpu", **{"kv_tokens": 4096, **options})  # type: ignore[arg-type]
        return Engine(model or self.model, config, self.processor.eos_token_ids)

    def image(self, seed: int, size: tuple[int, int] = SQUARE, alone: bool = False) -> ImagePatches:
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        decoded = DecodedImage.from_rgb(pixels)
        layouts = self.processor.layouts([decoded.size] if alone else [decoded.size, decoded.size])
        return self.processor.patches(decoded, layouts[0])

    def prompt(self, text: str, *images: ImagePatches) -> Asked:
        parts = (*(ImagePart(number) for number in range(len(images))), text)
        prompt = self.processor.prompt([Message("user", parts)], [image.layout for image in images])
        return Asked(prompt, prompt.in_order(images))

    def reference(self, prompt: Asked, count: int = ANSWER) -> list[int]:
        """Greedy tokens by computing the whole text again for every token."""
        known = self.answers.setdefault(prompt.cache_ids(), [])
        while len(known) < count:
            known.append(self.next_token(prompt, known))
        return known[:count]

    @torch.inference_mode()
    def next_token(self, asked: Asked, answered: Sequence[int]) -> int:
        prompt = asked.prompt
        language, ids = self.model.language, [*prompt.token_ids, *answered]
        embeds = language.embed(torch.tensor(ids))
        rows = [list(self.model.vision([image]).embeds) for image in asked.images]
        for start, stop, image in prompt.spans:
            for position in range(start, stop):
                embeds[position] = rows[image].pop(0)
        hidden = language(embeds, torch.arange(len(ids)), SegmentAttention([len(ids)]))
        best, second = language.logits(hidden[-1:])[0].topk(2).values.tolist()
        assert best - second > 1e-4, "the tokens of this model are too close to call; take another seed"
        return int(language.logits(hidden[-1:]).argmax())


@pytest.fixture(scope="module")
def tiny(nvila_folder: Path) -> Tiny:
    checkpoint = open_checkpoint(nvila_folder)
    processor = load_processor(checkpoint)
    return Tiny(nvila_folder, load_model(checkpoint, processor.config, device="cpu", dtype=torch.float32), processor)


@pytest.fixture(scope="module")
def prompts(tiny: Tiny) -> Mapping[str, Asked]:
    """Every kind of prompt. Two share an image and its place, so that their beginnings are equal."""
    first, second = tiny.image(1), tiny.image(2)
    return MappingProxyType(
        {
            "text": tiny.prompt("What is this?"),
            "image": tiny.prompt("What is this?", first),
            "question": tiny.prompt("And where?", first),
            "images": tiny.prompt("Which is larger?", second, first, tiny.image(3)),
            "tiles": tiny.prompt("Describe.", tiny.image(4, WIDE, alone=True)),
        }
    )


@dataclass
class Answer:
    """What an engine said to one request. last: how it ended."""

    tokens: list[int] = field(default_factory=list)
    last: Finished = field(default_factory=lambda: Finished("error"))


def said(delta: TokenDelta) -> list[int]:
    return [] if delta.token_id is None else [delta.token_id]


def greedy(name: str, prompt: Asked, max_tokens: int = ANSWER, **sampling: object) -> Request:
    params = SamplingParams(**{"ignore_eos": True, **sampling})  # type: ignore[arg-type]
    return prompt.request(name, params, max_tokens)


def run(engine: Engine, requests: Iterable[Request], apart: int = 0) -> dict[str, Answer]:
    """Answers by request id. `apart`: steps between arrivals. Every request ends exactly once and leaves nothing."""
    waiting = list(requests)
    answers = {request.request_id: Answer() for request in waiting}
    ended: list[str] = []
    for step in range(5000):
        while waiting and (apart == 0 or step % apart == 0):
            engine.add(waiting.pop(0))
            if apart:
                break
        if not engine.has_work and not waiting:
            break
        for delta in engine.step() if engine.has_work else []:
            assert delta.request_id not in ended, "somebody spoke after the end"
            answers[delta.request_id].tokens += said(delta)
            if delta.finished is not None:
                ended.append(delta.request_id)
                answers[delta.request_id].last = delta.finished
    assert sorted(ended) == sorted(answers)
    check_idle(engine)
    return answers


def check_idle(engine: Engine) -> None:
    """All pages are free or can be had back from the prefix cache."""
    assert not engine.has_work
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.pages_free + stats.pages_cached == stats.pages_total
    if engine.prefix_cache is not None:
        assert engine.prefix_cache.evictable == stats.pages_cached


def tokens(answers: Mapping[str, Answer]) -> dict[str, list[int]]:
    return {name: answer.tokens for name, answer in answers.items()}


def count_encodes(engine: Engine) -> list[int]:
    """How many images each tower call will have got."""
    calls: list[int] = []
    encode = engine.runner.encode

    def counted(images: Sequence[ImagePatches]) -> tuple[torch.Tensor, ...]:
        calls.append(len(images))
        return encode(images)

    engine.runner.encode = counted  # type: ignore[method-assign]
    return calls


class TestGreedyTokens:
    """They are the reference's, whatever the schedule."""

    def test_the_prompts_of_these_tests_differ_in_their_answers(self, tiny: Tiny, prompts: Mapping[str, Asked]) -> None:
        assert len({tuple(tiny.reference(prompt)) for prompt in prompts.values()}) == len(prompts)
        other = tiny.prompt("What is this?", tiny.image(9))
        assert tiny.reference(other) != tiny.reference(prompts["image"]), "nobody looks at the image"
        assert len(prompts["tiles"].images[0].layout.tiles) > 2

    @pytest.mark.parametrize("kind", ["text", "image", "images", "tiles"])
    def test_each_kind_of_prompt_alone(self, tiny: Tiny, prompts: Mapping[str, Asked], kind: str) -> None:
        answers = run(tiny.engine(), [greedy("a", prompts[kind])])
        assert answers["a"].tokens == tiny.reference(prompts[kind])
        assert answers["a"].last.encoded_images == len(prompts[kind].images)

    @pytest.mark.few(
        "False-*", "True-default", "True-max_batch_tokens=7", "True-page_size=1",
        "True-max_running=2 max_batch_patches=20 max_batch_tokens=11",
    )  # fmt: skip
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"max_batch_tokens": 1},
            {"max_batch_tokens": 7},
            {"max_batch_tokens": 100_000},
            {"max_batch_tokens": 7, "feature_cache_bytes": 0, "prefix_cache": False},
            {"page_size": 1},
            {"page_size": 3, "max_batch_tokens": 5},
            {"page_size": 64},
            {"prefix_cache": False},
            {"feature_cache_bytes": 0},
            {"max_batch_patches": 1},
            {"enable_packing": False},
            {"max_running": 1},
            {"max_running": 2, "max_batch_patches": 20, "max_batch_tokens": 11},
        ],
        ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()) or "default",
    )
    @pytest.mark.parametrize("backwards", [False, True])
    def test_no_budget_page_size_cache_or_order_changes_them(
        self, tiny: Tiny, prompts: Mapping[str, Asked], options: dict[str, object], backwards: bool
    ) -> None:
        requests = [greedy(name, prompt) for name, prompt in prompts.items()]
        answers = run(tiny.engine(**options), reversed(requests) if backwards else requests)
        assert tokens(answers) == {name: tiny.reference(prompt) for name, prompt in prompts.items()}

    @pytest.mark.parametrize("apart", [1, 3])
    def test_arrival_in_the_middle_of_others_changes_nothing(
        self, tiny: Tiny, prompts: Mapping[str, Asked], apart: int
    ) -> None:
        engine = tiny.engine(max_batch_tokens=16)
        answers = run(engine, [greedy(name, prompt) for name, prompt in prompts.items()], apart=apart)
        assert tokens(answers) == {name: tiny.reference(prompt) for name, prompt in prompts.items()}

    @pytest.mark.few("1-True", "4-False", "16-True")
    @pytest.mark.parametrize("prefix_cache", [False, True])
    @pytest.mark.parametrize("page_size", [1, 4, 16])
    def test_preemption_changes_nothing(
        self, tiny: Tiny, prompts: Mapping[str, Asked], prefix_cache: bool, page_size: int
    ) -> None:
        """The cache holds the longest request and little more; all of them want to run."""
        answer = 20
        longest = max(len(prompt.token_ids) for prompt in prompts.values()) + answer
        engine = tiny.engine(page_size=page_size, kv_tokens=longest + 40, prefix_cache=prefix_cache)
        put_back, preempt = [], engine.scheduler._preempt
        engine.scheduler._preempt = lambda one: (put_back.append(one.request.request_id), preempt(one))  # type: ignore
        requests = [greedy(f"{name} {n}", prompts[name], answer) for n in range(3) for name in ("text", "image")]
        answers = run(engine, requests)
        assert put_back
        for request in requests:
            assert answers[request.request_id].tokens == tiny.reference(Asked(request.prompt, request.images), answer)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_precision_runs_on_the_cpu(self, tiny: Tiny, prompts: Mapping[str, Asked], dtype: str) -> None:
        engine = load_engine(str(tiny.folder), EngineConfig(device="cpu", dtype=dtype, kv_tokens=2048))
        assert engine.runner.kv.keys.dtype == engine.runner.model.language.norm.weight.dtype == getattr(torch, dtype)
        answers = run(engine, [greedy(name, prompt, logprobs=0) for name, prompt in prompts.items()])
        assert {answer.last.reason for answer in answers.values()} == {"length"}
        assert engine.runner.kv.keys.isfinite().all()


class TestReuse:
    def test_the_same_request_again_computes_one_token_and_encodes_nothing(
        self, tiny: Tiny, prompts: Mapping[str, Asked]
    ) -> None:
        engine = tiny.engine(page_size=1)
        run(engine, [greedy("first", prompts["tiles"])])
        calls, computed = count_encodes(engine), engine.stats().computed_tokens
        again = run(engine, [greedy("again", prompts["tiles"], 1)])["again"]
        assert again.tokens == tiny.reference(prompts["tiles"], 1)
        assert again.last.cached_tokens == engine.stats().cached_tokens == len(prompts["tiles"].token_ids) - 1
        assert engine.stats().computed_tokens == computed + 1
        assert (again.last.encoded_images, calls) == (0, [])

    @pytest.mark.parametrize("prefix_cache", [False, True])
    def test_a_new_question_about_a_known_image_encodes_nothing(
        self, tiny: Tiny, prompts: Mapping[str, Asked], prefix_cache: bool
    ) -> None:
        engine = tiny.engine(prefix_cache=prefix_cache)
        run(engine, [greedy("first", prompts["image"])])
        calls = count_encodes(engine)
        second = run(engine, [greedy("second", prompts["question"])])["second"]
        assert second.tokens == tiny.reference(prompts["question"])
        assert (second.last.cached_tokens > 0) == prefix_cache
        assert (second.last.encoded_images, calls) == (0, [])

    def test_the_next_turn_of_a_conversation_starts_where_the_last_one_ended(
        self, tiny: Tiny, prompts: Mapping[str, Asked]
    ) -> None:
        engine, asked = tiny.engine(page_size=4), prompts["image"]
        said = run(engine, [greedy("first", asked)])["first"].tokens
        longer = Asked(replace(asked.prompt, token_ids=(*asked.token_ids, *said, 11, 12, 13)), asked.images)
        second = run(engine, [greedy("second", longer)])["second"]
        assert second.tokens == tiny.reference(longer)
        assert second.last.cached_tokens >= len(asked.token_ids) + len(said) - 1 - 3

    def test_all_new_images_of_a_step_go_through_one_tower_call(self, tiny: Tiny) -> None:
        engine = tiny.engine(max_batch_tokens=10_000, max_batch_patches=10_000)
        run(engine, [greedy("known", tiny.prompt("Hello."))])  # else they wait for the first to read their system turn
        calls = count_encodes(engine)
        asked = [tiny.prompt("One?", tiny.image(n), tiny.image(n + 10)) for n in range(3)]
        asked.append(tiny.prompt("Tiles?", tiny.image(4, WIDE, alone=True)))
        run(engine, [greedy(str(number), prompt) for number, prompt in enumerate(asked)])
        assert calls == [7]

    def test_without_packing_each_image_has_a_forward_of_its_own(
        self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = tiny.engine(max_batch_tokens=10_000, max_batch_patches=10_000, enable_packing=False)
        sizes: list[int] = []
        vision = engine.runner.model.vision
        real = vision.forward

        def counting(images: list[ImagePatches], *others: object) -> ImageTokens:
            sizes.append(len(images))
            return real(images, *others)

        monkeypatch.setattr(vision, "forward", counting)
        run(engine, [greedy("one", tiny.prompt("Two?", tiny.image(1), tiny.image(2)))])
        assert sizes == [1, 1]

    def test_images_with_equal_pixels_in_one_step_are_encoded_once(self, tiny: Tiny) -> None:
        engine = tiny.engine(max_batch_tokens=10_000, prefix_cache=False, feature_cache_bytes=0)
        calls = count_encodes(engine)
        asked = {str(n): tiny.prompt(f"{n}?", tiny.image(1), tiny.image(n), tiny.image(1)) for n in (1, 2)}
        answers = run(engine, [greedy(name, prompt) for name, prompt in asked.items()])
        assert calls == [2]
        assert tokens(answers) == {name: tiny.reference(prompt) for name, prompt in asked.items()}
        assert engine.stats().encoded_images == sum(answer.last.encoded_images for answer in answers.values()) == 2

    def test_tenants_share_neither_pages_nor_images(self, tiny: Tiny, prompts: Mapping[str, Asked]) -> None:
        engine = tiny.engine()
        for salt in ("", "a", "b", "a"):
            request = prompts["image"].request(f"of {salt}", SamplingParams(ignore_eos=True), ANSWER, salt)
            answer = run(engine, [request])[request.request_id]
            assert answer.tokens == tiny.reference(prompts["image"])
            known = salt == "a" and engine.stats().encoded_images == 3
            assert (answer.last.cached_tokens > 0, answer.last.encoded_images) == (known, 0 if known else 1)


class TestSampling:
    def test_every_seed_has_its_answer_whatever_runs_beside(self, tiny: Tiny, prompts: Mapping[str, Asked]) -> None:
        def ask(*seeds: int, **options: object) -> dict[str, list[int]]:
            requests = [greedy(str(seed), prompts["image"], temperature=1.0, seed=seed) for seed in seeds]
            return tokens(run(tiny.engine(**options), requests))

        together = ask(0, 1, 2, 3)
        assert len({tuple(answer) for answer in together.values()}) == 4
        assert together == ask(3, 1, 0, 2, max_batch_tokens=9)
        assert {"2": together["2"]} == ask(2)

    def test_preemption_repeats_the_same_numbers(self, tiny: Tiny, prompts: Mapping[str, Asked]) -> None:
        def ask(*seeds: int, kv_tokens: int = 4096) -> tuple[dict[str, list[int]], int]:
            engine, put_back = tiny.engine(kv_tokens=kv_tokens, page_size=4), 0
            preempt = engine.scheduler._preempt

            def counted(one: Running) -> None:
                nonlocal put_back
                put_back += one.answered > 0
                preempt(one)

            engine.scheduler._preempt = counted  # type: ignore[method-assign]
            requests = [greedy(str(seed), prompts["text"], 20, temperature=1.0, seed=seed) for seed in seeds]
            return tokens(run(engine, requests)), put_back

        crowded, put_back = ask(0, 1, 2, 3, kv_tokens=len(prompts["text"].token_ids) + 40)
        assert put_back
        assert crowded == {name: answer for seed in range(4) for name, answer in ask(seed)[0].items()}

    def test_no_seed_means_another_answer_each_time(self, tiny: Tiny, prompts: Mapping[str, Asked]) -> None:
        answers = run(tiny.engine(), [greedy(str(n), prompts["text"], 12, temperature=1.5) for n in range(3)])
        assert len({tuple(answer.tokens) for answer in answers.values()}) > 1

    @pytest.mark.parametrize("seed", [-1, 2**63, 2**64 + 5, -(2**70)])
    def test_any_integer_is_a_seed(self, tiny: Tiny, prompts: Mapping[str, Asked], seed: int) -> None:
        once, again = (
            tokens(run(tiny.engine(), [greedy("a", prompts["text"], temperature=1.0, seed=seed)])) for _ in range(2)
        )
        assert once == again

    def test_logprobs_are_the_references(self, tiny: Tiny, prompts: Mapping[str, Asked]) -> None:
        engine, found = tiny.engine(), []
        engine.add(greedy("a", prompts["tiles"], 3, logprobs=2))
        while engine.has_work:
            found += [delta.logprob for delta in engine.step() if delta.logprob is not None]
        assert (
            [one.token_id for one in found] == [one.top[0][0] for one in found] == tiny.reference(prompts["tiles"], 3)
        )
        assert all(one.logprob == one.top[0][1] > one.top[1][1] for one in found)


class Oracle(Lookup):
    """Guesses what comes, which a test knows, with a wrong token now and then."""

    coming: Sequence[tuple[tuple[int, ...], list[int]]] = ()  # prompts and answers

    def guess(self, ids: Sequence[int], room: int) -> tuple[int, ...]:
        numbers = random.Random(len(ids))
        for prompt, answer in self.coming:
            said = len(ids) - len(prompt)
            if said >= 0 and (*prompt, *answer[:said]) == tuple(ids):
                right = answer[said : said + max(0, min(room, self.most))]
                return tuple(token if numbers.random() < 0.8 else token // 2 for token in right)
        return ()


MANNERS: Mapping[str, Mapping[str, object]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 3},
    "filtered": {"temperature": 0.8, "seed": 4, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.2},
    "sampled-penalties": {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.1},
    "bias": {"logit_bias": ((7, 2.0), (8, -3.0)), "temperature": 1.0, "seed": 6},
    "logprobs": {"logprobs": 3},
    "early": {"ignore_eos": False, "min_tokens": 5, "stop_token_ids": tuple(range(0, 100, 7))},
}


class TestGuesses:
    """Tokens that are guessed ahead are kept where they are what would have been chosen: no answer changes."""

    LONG = 40

    def ask(self, tiny: Tiny, prompts: Mapping[str, Asked], guessed: int, **options: object) -> dict[str, Answer]:
        requests = [
            greedy(f"{kind} {manner}", prompts[kind], self.LONG, num_speculative_tokens=guessed, **how)
            for kind in ("text", "image", "tiles")
            for manner, how in MANNERS.items()
        ]
        return run(tiny.engine(**options), requests)

    @pytest.fixture(scope="class")
    def expected(self, tiny: Tiny, prompts: Mapping[str, Asked]) -> dict[str, Answer]:
        return self.ask(tiny, prompts, 0)

    @pytest.fixture
    def oracle(
        self, prompts: Mapping[str, Asked], expected: dict[str, Answer], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        coming = [(prompts[name.split()[0]].cache_ids(), answer.tokens) for name, answer in expected.items()]
        monkeypatch.setattr(Oracle, "coming", coming)
        monkeypatch.setattr("siglane.engine.engine.Lookup", Oracle)

    def test_looking_back_changes_no_answer(
        self, tiny: Tiny, prompts: Mapping[str, Asked], expected: dict[str, Answer]
    ) -> None:
        found = self.ask(tiny, prompts, 8, max_running=4)
        assert tokens(found) == tokens(expected)
        assert any(answer.last.accepted_prediction_tokens for answer in found.values())

    @pytest.mark.few("small steps", "preempted")
    @pytest.mark.usefixtures("oracle")
    @pytest.mark.parametrize(
        "options",
        [
            {"max_running": 2},
            {"page_size": 4, "max_batch_tokens": 9, "max_running": 3},
            {"prefix_cache": False, "max_running": 1},
            {"page_size": 5, "kv_tokens": 400},
        ],
        ids=["two", "small steps", "alone", "preempted"],
    )
    def test_no_guess_changes_an_answer(
        self, tiny: Tiny, prompts: Mapping[str, Asked], expected: dict[str, Answer], options: dict[str, object]
    ) -> None:
        found = self.ask(tiny, prompts, 8, **options)
        assert tokens(found) == tokens(expected)
        assert {name: answer.last.reason for name, answer in found.items()} == {
            name: answer.last.reason for name, answer in expected.items()
        }
        right, wrong = (
            sum(getattr(answer.last, f"{what}_prediction_tokens") for answer in found.values())
            for what in ("accepted", "rejected")
        )
        assert min(right, wrong) > self.LONG

    @pytest.mark.usefixtures("oracle")
    def test_logprobs_are_those_of_the_kept_tokens(self, tiny: Tiny, prompts: Mapping[str, Asked]) -> None:
        def reported(guessed: int) -> list[tuple[int, float]]:
            engine = tiny.engine()
            engine.add(greedy("a", prompts["text"], 20, logprobs=2, num_speculative_tokens=guessed))
            found = []
            while engine.has_work:
                found += [delta.logprob for delta in engine.step() if delta.logprob is not None]
            return [(one.token_id, one.logprob) for one in found]

        plain, ahead = reported(0), reported(8)
        assert [token for token, _ in ahead] == [token for token, _ in plain]
        assert [value for _, value in ahead] == pytest.approx([value for _, value in plain], abs=1e-4)

    @pytest.mark.usefixtures("oracle")
    def test_right_guesses_save_steps(self, tiny: Tiny, prompts: Mapping[str, Asked]) -> None:
        steps, lasts = [], []
        for guessed in (0, 8):
            engine = tiny.engine()
            lasts.append(
                run(engine, [greedy("a", prompts["text"], self.LONG, num_speculative_tokens=guessed)])["a"].last
            )
            steps.append(engine.stats().steps)
        assert (lasts[0].accepted_prediction_tokens, lasts[0].rejected_prediction_tokens) == (0, 0)
        assert steps[0] - steps[1] == lasts[1].accepted_prediction_tokens > self.LONG // 2

    @pytest.mark.parametrize(("of_engine", "of_request", "guesses"), [(4, None, True), (4, 0, False), (0, 4, True)])
    def test_a_request_decides_before_the_engine(
        self, tiny: Tiny, prompts: Mapping[str, Asked], of_engine: int, of_request: int | None, guesses: bool
    ) -> None:
        engine = tiny.engine(num_speculative_tokens=of_engine)
        bias = ((5, 100.0),)  # one word for ever
        asked = greedy("a", prompts["text"], self.LONG, logit_bias=bias, num_speculative_tokens=of_request)
        assert (run(engine, [asked])["a"].last.accepted_prediction_tokens > self.LONG // 2) == guesses

    @pytest.mark.usefixtures("oracle")
    def test_guesses_whose_rows_are_nan_end_their_own_request(
        self, tiny: Tiny, prompts: Mapping[str, Asked], expected: dict[str, Answer], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = tiny.engine()
        forward = engine.runner.forward

        def broken(batch: StepPlan) -> Computed:
            found, row = forward(batch), 0
            for chunk in batch.chunks:
                row += len(chunk.next_tokens)
                if chunk.guesses and chunk.sequence.request.request_id == "bad":
                    found.logits[row - len(chunk.guesses)] = torch.nan  # behind the first guess
            return found

        monkeypatch.setattr(engine.runner, "forward", broken)
        requests = [
            greedy(name, prompts["text"], self.LONG, num_speculative_tokens=8) for name in ("good", "bad", "other")
        ]
        found = run(engine, requests)
        whole = expected["text greedy"].tokens
        assert found["good"].tokens == found["other"].tokens == whole
        assert found["bad"].last.reason == "error"
        assert found["bad"].tokens == whole[: len(found["bad"].tokens)]


class TestEnds:
    def end(
        self, tiny: Tiny, prompt: Asked, max_tokens: int = ANSWER, **sampling: object
    ) -> tuple[list[int], Finished]:
        answer = run(tiny.engine(), [greedy("a", prompt, max_tokens, **{"ignore_eos": False, **sampling})])["a"]
        return answer.tokens, answer.last

    @pytest.mark.parametrize("max_tokens", [1, 2, 5])
    def test_max_tokens(self, tiny: Tiny, prompts: Mapping[str, Asked], max_tokens: int) -> None:
        found, last = self.end(tiny, prompts["text"], max_tokens, ignore_eos=True)
        assert found == tiny.reference(prompts["text"], max_tokens)
        assert (last.reason, last.matched_stop) == ("length", None)

    def test_the_models_end_of_answer(self, tiny: Tiny, prompts: Mapping[str, Asked]) -> None:
        (eos,) = tiny.processor.eos_token_ids
        found, last = self.end(tiny, prompts["text"], logit_bias=((eos, 1000.0),))
        assert (found, last.reason, last.matched_stop) == ([eos], "stop", eos)

    def test_the_end_can_be_ignored_or_put_off(self, tiny: Tiny, prompts: Mapping[str, Asked]) -> None:
        (eos,) = tiny.processor.eos_token_ids
        wants_to_end = {"logit_bias": ((eos, 1000.0),)}
        found, last = self.end(tiny, prompts["text"], 3, ignore_eos=True, **wants_to_end)
        assert (found, last.reason) == ([eos] * 3, "length")
        found, last = self.end(tiny, prompts["text"], min_tokens=2, **wants_to_end)
        assert len(found) == 3
        assert eos not in found[:2]
        assert (last.reason, last.matched_stop) == ("stop", eos)

    def test_stop_token_ids(self, tiny: Tiny, prompts: Mapping[str, Asked]) -> None:
        whole = tiny.reference(prompts["image"])
        stop = whole[2]
        found, last = self.end(tiny, prompts["image"], ignore_eos=True, stop_token_ids=(stop,))
        assert found == whole[: whole.index(stop) + 1]
        assert (last.reason, last.matched_stop) == ("stop", stop)

    def test_the_context_ends_an_answer(self, tiny: Tiny, prompts: Mapping[str, Asked]) -> None:
        length = len(prompts["text"].token_ids)
        engine = tiny.engine(kv_tokens=length + 3, page_size=1)
        assert engine.context_length == length + 3
        answer = run(engine, [greedy("a", prompts["text"], 100)])["a"]
        assert answer.tokens == tiny.reference(prompts["text"], 3)
        assert answer.last.reason == "length"


class TestRefusals:
    """They say what is wrong and leave the engine as it was."""

    def refuse(self, engine: Engine, request: Request) -> Exception:
        with pytest.raises((UserError, ValueError)) as caught:
            engine.add(request)
        check_idle(engine)
        return caught.value

    @pytest.mark.parametrize("extra", [0, 1, 500])
    def test_a_prompt_that_leaves_no_room_for_an_answer(self, tiny: Tiny, extra: int) -> None:
        engine = tiny.engine(kv_tokens=64)
        error = self.refuse(engine, greedy("a", Asked(Prompt((5,) * (64 + extra)))))
        assert isinstance(error, UserError)
        assert error.code == "context_length_exceeded"
        assert f"{64 + extra} tokens" in str(error)
        assert "64;" in str(error)
        assert len(run(engine, [greedy("a", Asked(Prompt((5,) * 63)))])["a"].tokens) == 1

    def test_an_empty_prompt(self, tiny: Tiny) -> None:
        error = self.refuse(tiny.engine(), greedy("a", Asked(Prompt(()))))
        assert isinstance(error, UserError)
        assert error.code == "empty_prompt"

    @pytest.mark.parametrize("bias", [(-1, 1.0), (323, 1.0), (0, math.nan), (0, math.inf)])
    def test_a_bias_for_no_token(self, tiny: Tiny, bias: tuple[int, float]) -> None:
        """An index out of range must never reach the logits of the batch."""
        assert tiny.model.language.config.vocab_size == 323
        error = self.refuse(tiny.engine(), greedy("a", Asked(Prompt((5,))), logit_bias=((0, 1.0), bias)))
        assert isinstance(error, UserError)
        assert error.param == "logit_bias"

    def test_an_id_that_is_in_use(self, tiny: Tiny, prompts: Mapping[str, Asked]) -> None:
        engine = tiny.engine()
        engine.add(greedy("a", prompts["text"]))
        with pytest.raises(ValueError, match="'a' is in use"):
            engine.add(greedy("a", prompts["image"]))
        found = []
        while engine.has_work:
            found += [token_id for delta in engine.step() for token_id in said(delta)]
        assert found == tiny.reference(prompts["text"])
        run(engine, [greedy("a", prompts["text"])])  # free again


class TestAborts:
    @pytest.mark.parametrize("steps", [0, 1, 2, 8])
    def test_an_abort_in_any_phase_harms_nobody(self, tiny: Tiny, prompts: Mapping[str, Asked], steps: int) -> None:
        """After 0 steps it waits, after 1 it is read, after 8 it answers."""
        engine = tiny.engine(max_batch_tokens=40)
        answers: dict[str, list[int]] = {"kept": [], "aborted": []}
        engine.add(greedy("aborted", prompts["tiles"], 50))
        engine.add(greedy("kept", prompts["image"], 10))
        for _ in range(steps):
            for delta in engine.step():
                answers[delta.request_id] += said(delta)
        last = engine.abort("aborted")
        assert last is not None
        assert last.finished is not None
        assert (last.request_id, last.finished.reason, last.token_id) == ("aborted", "abort", None)
        assert engine.abort("aborted") is None
        while engine.has_work:
            for delta in engine.step():
                answers[delta.request_id] += said(delta)
        assert answers["kept"] == tiny.reference(prompts["image"], 10)
        assert answers["aborted"] == tiny.reference(prompts["tiles"], len(answers["aborted"]))
        check_idle(engine)

    def test_an_unknown_request_has_already_ended(self, tiny: Tiny) -> None:
        assert tiny.engine().abort("nobody") is None


Encode = Callable[[Sequence[ImagePatches]], tuple[torch.Tensor, ...]]
Forward = Callable[[StepPlan], torch.Tensor]


class TestFaults:
    """A fault ends its request with an error; the tokens of all others are those of a run without it."""

    def check(self, tiny: Tiny, engine: Engine, bad: Request, others: Mapping[str, Asked], code: str) -> Answer:
        names = list(others)
        requests = [greedy(names[0], others[names[0]]), bad, *(greedy(name, others[name]) for name in names[1:])]
        answers = run(engine, requests)
        failed = answers.pop(bad.request_id)
        assert failed.last.reason == "error"
        assert isinstance(failed.last.error, EngineError)
        assert failed.last.error.code == code
        assert tokens(answers) == {name: tiny.reference(prompt) for name, prompt in others.items()}
        assert all(answer.last.reason == "length" for answer in answers.values())
        return failed

    @staticmethod
    def break_encode(engine: Engine, bad: ImagePatches, fault: Callable[[torch.Tensor], torch.Tensor]) -> None:
        encode = engine.runner.encode

        def broken(images: Sequence[ImagePatches]) -> tuple[torch.Tensor, ...]:
            rows = encode(images)
            return tuple(
                fault(one) if image.digest == bad.digest else one for image, one in zip(images, rows, strict=True)
            )

        engine.runner.encode = broken  # type: ignore[method-assign]

    @staticmethod
    def break_forward(engine: Engine, fault: Callable[[StepPlan, torch.Tensor], torch.Tensor]) -> None:
        forward = engine.runner.forward

        def broken(batch: StepPlan) -> Computed:
            found = forward(batch)
            return found._replace(logits=fault(batch, found.logits))

        engine.runner.forward = broken  # type: ignore[method-assign]

    @pytest.mark.parametrize("chunk", [7, 10_000])
    def test_an_image_that_cannot_be_encoded(self, tiny: Tiny, prompts: Mapping[str, Asked], chunk: int) -> None:
        def explode(rows: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("shapes do not match")

        engine, image = tiny.engine(max_batch_tokens=chunk), tiny.image(50)
        self.break_encode(engine, image, explode)
        bad = greedy("bad", tiny.prompt("Bad?", tiny.image(1), image))
        failed = self.check(tiny, engine, bad, prompts, "engine_error")
        assert failed.tokens == []
        assert "RuntimeError" in str(failed.last.error)

    def test_an_image_whose_features_are_nan_is_never_kept(self, tiny: Tiny, prompts: Mapping[str, Asked]) -> None:
        engine, image = tiny.engine(), tiny.image(50)
        encode = engine.runner.encode
        self.break_encode(engine, image, lambda rows: rows.index_fill(0, torch.tensor([1]), math.nan))
        asked = tiny.prompt("Bad?", image)
        self.check(tiny, engine, greedy("bad", asked), prompts, "engine_nan")
        engine.runner.encode = encode  # type: ignore[method-assign]
        assert tokens(run(engine, [greedy("again", asked)])) == {"again": tiny.reference(asked)}

    def test_everyone_who_wants_a_bad_image_fails_and_nobody_else(
        self, tiny: Tiny, prompts: Mapping[str, Asked]
    ) -> None:
        engine, image = tiny.engine(max_batch_tokens=10_000, prefix_cache=False), tiny.image(50)
        self.break_encode(engine, image, lambda rows: rows * math.inf)
        requests = [greedy(f"bad {n}", tiny.prompt(f"{n}?", image)) for n in range(2)]
        answers = run(engine, [*requests, greedy("good", prompts["image"])])
        assert [answers[f"bad {n}"].last.reason for n in range(2)] == ["error"] * 2
        assert answers["good"].tokens == tiny.reference(prompts["image"])

    @pytest.mark.parametrize("wrong", [-1, 1])
    def test_features_of_another_length_than_the_layout_says(
        self, tiny: Tiny, prompts: Mapping[str, Asked], wrong: int
    ) -> None:
        engine, image = tiny.engine(), tiny.image(50)
        self.break_encode(engine, image, lambda rows: rows[:-1] if wrong < 0 else torch.cat([rows, rows[:1]]))
        self.check(tiny, engine, greedy("bad", tiny.prompt("Bad?", image)), prompts, "engine_error")

    @pytest.mark.parametrize("after", [0, 1, 4], ids=["in its prompt", "at its first token", "in its answer"])
    def test_a_request_that_cannot_be_computed(self, tiny: Tiny, prompts: Mapping[str, Asked], after: int) -> None:
        asked = tiny.prompt("Bad?", tiny.image(50))

        def explode(batch: StepPlan, logits: torch.Tensor) -> torch.Tensor:
            for chunk in batch.chunks:
                if chunk.sequence.request.request_id == "bad" and len(chunk.sequence.output_ids) >= after:
                    raise ValueError("a bug in one request")
            return logits

        engine = tiny.engine(max_batch_tokens=48)
        self.break_forward(engine, explode)
        failed = self.check(tiny, engine, greedy("bad", asked, 10), prompts, "engine_error")
        assert failed.tokens == tiny.reference(asked, after)
        assert "ValueError" in str(failed.last.error)
        assert "a bug" not in str(failed.last.error)  # what an exception says may hold anybody's data

    @pytest.mark.parametrize("poison", [math.nan, math.inf])
    @pytest.mark.parametrize("after", [0, 2])
    def test_logits_that_are_not_finite(
        self, tiny: Tiny, prompts: Mapping[str, Asked], poison: float, after: int
    ) -> None:
        asked = tiny.prompt("Bad?", tiny.image(50))

        def spoil(batch: StepPlan, logits: torch.Tensor) -> torch.Tensor:
            sampling = [chunk.sequence for chunk in batch.chunks if chunk.samples]
            for row, sequence in enumerate(sampling):
                if sequence.request.request_id == "bad" and len(sequence.output_ids) >= after:
                    logits[row, 7] = poison
            return logits

        engine = tiny.engine()
        self.break_forward(engine, spoil)
        failed = self.check(tiny, engine, greedy("bad", asked, 10), prompts, "engine_nan")
        assert failed.tokens == tiny.reference(asked, after)

    def test_what_ended_in_nan_is_not_reused(self, tiny: Tiny) -> None:
        asked = Asked(Prompt(tuple(range(5, 45))))
        engine = tiny.engine(page_size=4)
        forward = engine.runner.forward
        self.break_forward(engine, lambda batch, logits: logits * math.nan)
        assert run(engine, [greedy("bad", asked)])["bad"].last.reason == "error"
        engine.runner.forward = forward  # type: ignore[method-assign]
        good = run(engine, [greedy("good", asked)])["good"]
        assert good.tokens == tiny.reference(asked)
        assert good.last.cached_tokens == 0

    @pytest.mark.parametrize("chunk", [5, 10_000])
    @pytest.mark.parametrize("page_size", [4, 16])
    def test_pages_that_held_nan_do_not_harm_their_next_owner(self, tiny: Tiny, chunk: int, page_size: int) -> None:
        """A page is read whole, under a mask, and NaN gets through masks. No hook here: the model itself breaks."""
        poison, good = 7, Asked(Prompt((5, 6, 8, 9, 10)))
        model = copy.deepcopy(tiny.model)
        model.language.embed_tokens.weight[poison] = math.nan
        engine = tiny.engine(model, page_size=page_size, kv_tokens=32, max_batch_tokens=chunk, prefix_cache=False)
        for _ in range(2):
            failed = run(engine, [greedy("bad", Asked(Prompt((5, poison) * 14)))])["bad"]
            assert isinstance(failed.last.error, EngineError)
            assert failed.last.error.code == "engine_nan"
        assert engine.runner.kv.keys.isnan().any()
        assert run(engine, [greedy("good", good, 20)])["good"].tokens == tiny.reference(good, 20)

    def test_beside_a_request_whose_rows_are_nan(self, tiny: Tiny, prompts: Mapping[str, Asked]) -> None:
        model = copy.deepcopy(tiny.model)
        model.language.embed_tokens.weight[7] = math.nan
        assert not any(7 in prompt.token_ids for prompt in prompts.values())
        engine = tiny.engine(model, max_batch_tokens=10_000)
        self.check(tiny, engine, greedy("bad", Asked(Prompt((5, 7, 6)))), prompts, "engine_nan")

    @pytest.mark.parametrize("broken", ["encode", "forward"])
    def test_a_lost_device_ends_the_engine_instead_of_failing_every_request(
        self, tiny: Tiny, prompts: Mapping[str, Asked], broken: str
    ) -> None:
        """Its process ends, and the supervisor starts another one."""

        def lost(_: object) -> tuple[torch.Tensor, ...]:
            raise torch.AcceleratorError("device-side assert triggered")

        engine = tiny.engine()
        setattr(engine.runner, broken, lost)
        engine.add(greedy("a", prompts["image"]))
        with pytest.raises(torch.AcceleratorError):
            engine.step()


class TestTimings:
    def test_images_encoded_together_are_waited_for_once(
        self, tiny: Tiny, prompts: Mapping[str, Asked], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine, now = tiny.engine(), [1000.0]
        encode = engine.runner.encode

        def slow(images: Sequence[ImagePatches]) -> tuple[torch.Tensor, ...]:
            now[0] += 10
            return encode(images)

        engine.runner.encode = slow  # type: ignore[method-assign]
        clock = SimpleNamespace(monotonic=lambda: now[0])
        monkeypatch.setattr("siglane.engine.engine.time", clock)  # not time: servers of this process sleep by it
        last = run(engine, [greedy("a", prompts["images"])])["a"].last
        assert len(prompts["images"].images) == last.encoded_images == 3
        assert (last.timings.encode, last.timings.prefill, last.timings.decode) == (10, 0, 0)

    def test_no_time_is_negative(self, tiny: Tiny, prompts: Mapping[str, Asked]) -> None:
        answers = run(tiny.engine(max_batch_tokens=20), [greedy(name, prompt) for name, prompt in prompts.items()])
        for answer in answers.values():
            timings = answer.last.timings
            assert min(timings.queue, timings.encode, timings.prefill, timings.decode) >= 0


class TestSizes:
    def test_the_cache_has_whole_pages_for_every_request_that_may_run(self, tiny: Tiny) -> None:
        engine = tiny.engine(kv_tokens=0, max_running=1, page_size=100)
        assert engine.context_length == 4096
        assert engine.allocator.total == 41

    def test_a_card_has_a_number_that_is_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Tensors tell theirs: what is kept for "cuda" would not be found for "cuda:0"."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        for name, number in (("auto", 0), ("cuda", 0), ("cuda:1", 1)):
            assert placement(EngineConfig(device=name, dtype="float32"))[0] == torch.device("cuda", number)
        with pytest.raises(UserError, match="'cuda:2' was asked for, torch finds 2"):
            placement(EngineConfig(device="cuda:2"))

    def test_batch_invariant_is_refused_by_name_where_it_cannot_be_promised(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(UserError, match="batch_invariant is promised on CUDA only"):
            placement(EngineConfig(device="cpu", batch_invariant=True))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        assert placement(EngineConfig(batch_invariant=True, dtype="float32"))[0].type == "cuda"
        for others in ({"quantization": "8bit"}, {"paged_backend": "torch"}, {"attention_backend": "eager"}):
            (name,) = others
            with pytest.raises(UserError, match=f"batch_invariant cannot be promised with {name} '{others[name]}'"):
                EngineConfig(batch_invariant=True, **others)  # type: ignore[arg-type]

    @pytest.mark.parametrize("device", ["mps", "meta", "gpu", "cuda:x"])
    def test_a_device_the_engine_cannot_use_is_refused_by_name(self, device: str) -> None:
        with pytest.raises(UserError, match=device):
            EngineConfig(device=device).resolve_device()


@dataclass
class Told(Answer):
    readouts: list[Readout] = field(default_factory=list)


class TestReads:
    """Log-probabilities of a prompt's own places are those of a forward over all of it, whatever the schedule."""

    @torch.inference_mode()
    def logprobs(self, tiny: Tiny, asked: Asked) -> torch.Tensor:
        """`[length, vocab_size]` of the tokens behind each place."""
        language = tiny.model.language
        embeds = language.embed(torch.tensor(asked.token_ids))
        rows = [iter(tiny.model.vision([image]).embeds) for image in asked.images]
        for start, stop, image in asked.prompt.spans:
            for position in range(start, stop):
                embeds[position] = next(rows[image])
        length = len(asked.token_ids)
        hidden = language(embeds, torch.arange(length), SegmentAttention([length]))
        return language.logits(hidden).log_softmax(-1)

    def reading(self, name: str, asked: Asked, every: int = 1, max_tokens: int = 0) -> Request:
        ids = [min(token_id, 300) for token_id in asked.token_ids]  # placeholders have no probability
        reads = tuple(Read(at, (ids[(at + 1) % len(ids)], 5), 3) for at in range(len(ids) - 1, -1, -every))[::-1]
        return replace(greedy(name, asked, max_tokens), reads=reads)

    def run(self, engine: Engine, requests: Sequence[Request]) -> dict[str, Told]:
        told = {request.request_id: Told() for request in requests}
        for request in requests:
            engine.add(request)
        while engine.has_work:
            for delta in engine.step():
                answer = told[delta.request_id]
                answer.tokens += said(delta)
                answer.readouts += delta.readouts
                answer.last = delta.finished or answer.last
        check_idle(engine)
        return told

    def check(self, tiny: Tiny, request: Request, told: Told) -> None:
        asked = Asked(request.prompt, request.images)
        expected = self.logprobs(tiny, asked)
        assert [found.position for found in told.readouts] == [read.position for read in request.reads]
        for read, found in zip(request.reads, told.readouts, strict=True):
            row = expected[read.position]
            assert found.logprobs == pytest.approx(row[list(read.token_ids)].tolist(), abs=1e-4)
            assert [value for _, value in found.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
            assert [row[token_id] for token_id, _ in found.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)

    @pytest.mark.parametrize(
        "options",
        [{}, {"max_batch_tokens": 7}, {"page_size": 1}, {"prefix_cache": False}, {"max_running": 1}],
        ids=str,
    )
    def test_of_every_place_and_of_a_few(self, tiny: Tiny, prompts: Mapping[str, Asked], options: Any) -> None:
        requests = [
            self.reading(f"{name} {every}", asked, every) for name, asked in prompts.items() for every in (1, 9)
        ]
        for request, told in zip(requests, self.run(tiny.engine(**options), requests).values(), strict=True):
            self.check(tiny, request, told)
            assert (told.tokens, told.last.reason) == ([], "length")

    def test_beside_an_answer_and_others(self, tiny: Tiny, prompts: Mapping[str, Asked]) -> None:
        engine = tiny.engine(max_batch_tokens=20, num_speculative_tokens=4)
        reading = self.reading("reads", prompts["image"], max_tokens=ANSWER)
        told = self.run(engine, [greedy("before", prompts["image"]), reading, greedy("after", prompts["tiles"])])
        self.check(tiny, reading, told["reads"])
        assert told["reads"].tokens == told["before"].tokens == tiny.reference(prompts["image"])
        assert told["after"].tokens == tiny.reference(prompts["tiles"])

    def test_a_known_prefix_is_not_computed_again_in_front_of_the_first_read(
        self, tiny: Tiny, prompts: Mapping[str, Asked]
    ) -> None:
        engine, asked = tiny.engine(page_size=4), prompts["image"]
        last = replace(self.reading("last", asked, every=10_000))
        run(engine, [greedy("before", asked)])
        told = self.run(engine, [last, self.reading("all", asked)])
        assert told["last"].last.cached_tokens == (len(asked.token_ids) - 1) // 4 * 4
        assert told["all"].last.cached_tokens == 0
        self.check(tiny, last, told["last"])

    def test_preemption_tells_nothing_twice(self, tiny: Tiny, prompts: Mapping[str, Asked]) -> None:
        requests = [self.reading(str(number), prompts["tiles"], max_tokens=40) for number in range(3)]
        pages = 2 + len(prompts["tiles"].token_ids) * 2 // 4
        engine = tiny.engine(page_size=4, kv_tokens=pages * 4, prefix_cache=False, max_batch_tokens=50)
        put_back, preempt = [], engine.scheduler._preempt
        engine.scheduler._preempt = lambda one: (put_back.append(one.reads_told), preempt(one))  # type: ignore
        told = self.run(engine, requests)
        assert any(put_back)
        for request in requests:
            self.check(tiny, request, told[request.request_id])
            assert told[request.request_id].tokens == tiny.reference(prompts["tiles"], 40)

    def test_nan_ends_the_request_and_is_not_kept(self, tiny: Tiny, prompts: Mapping[str, Asked]) -> None:
        model = copy.deepcopy(tiny.model)
        model.language.embed_tokens.weight[7] = math.nan
        engine = tiny.engine(model, page_size=2)
        bad = self.reading("bad", Asked(Prompt((5, 6, 5, 7, 6))))
        told = self.run(engine, [bad, greedy("good", prompts["text"])])
        assert (told["bad"].last.reason, told["good"].last.reason) == ("error", "length")
        assert isinstance(told["bad"].last.error, EngineError)
        assert told["bad"].last.error.code == "engine_nan"

    def test_what_cannot_be_read_is_refused(self, tiny: Tiny, prompts: Mapping[str, Asked]) -> None:
        asked, size = prompts["text"], tiny.model.language.config.vocab_size
        with pytest.raises(UserError, match=f"below {size}"):
            tiny.engine().add(replace(greedy("a", asked, 0), reads=(Read(0, (size,)),)))
        for places in ((len(asked.token_ids),), (1, 1), (2, 1), (-1,)):
            with pytest.raises(ValueError, match="ascend"):
                replace(greedy("a", asked, 0), reads=tuple(Read(at, (5,)) for at in places))
