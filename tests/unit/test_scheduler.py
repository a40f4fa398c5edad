"""What each step computes, on a model that is arithmetic (`engine_kit.Rig`): every step of every test here also checks
budgets, page ownership, that pages hold what was computed, and that images land at their places."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from engine_kit import Asked, Part, Rig, Tiled, continuation, image, prompt, request
from hypothesis import given, settings
from hypothesis import strategies as st

from siglane.types import Request


def finished(rig: Rig, *requests: Request) -> None:
    """Runs `requests` to their end; all of them got the model's answer and left nothing behind."""
    rig.add(*requests)
    rig.run()
    for one in requests:
        assert rig.answers[one.request_id] == continuation(one, one.max_tokens), one.request_id
    rig.check_idle()


def text(length: int, first: int = 0) -> Asked:
    return prompt(*range(first, first + length))


class TestBudgets:
    def test_a_long_prompt_is_read_in_chunks_of_the_token_budget(self) -> None:
        rig = Rig(tokens=4)
        finished(rig, request("a", text(10), max_tokens=2))
        assert rig.steps == [[("a", 0, 4)], [("a", 4, 8)], [("a", 8, 10)], [("a", 10, 11)]]

    def test_requests_share_a_step_in_order_of_arrival(self) -> None:
        rig = Rig(tokens=8)
        finished(
            rig, *(request(name, text(3, first), max_tokens=1) for name, first in (("a", 0), ("b", 10), ("c", 20)))
        )
        assert rig.steps == [[("a", 0, 3), ("b", 0, 3), ("c", 0, 2)], [("c", 2, 3)]]

    def test_who_decodes_comes_before_who_reads_even_if_he_came_later(self) -> None:
        rig = Rig(tokens=8, patches=4)
        finished(
            rig,
            request("reads", prompt(image(1), image(2), image(3), 7), max_tokens=1),
            request("decodes", text(3), max_tokens=3),
        )
        assert rig.steps == [
            [("reads", 0, 4), ("decodes", 0, 3)],
            [("decodes", 3, 4), ("reads", 4, 8)],
            [("decodes", 4, 5), ("reads", 8, 13)],
        ]

    def test_no_more_requests_run_than_allowed(self) -> None:
        rig = Rig(running=2, tokens=100)
        rig.add(*(request(str(number), text(2, number), max_tokens=2) for number in range(5)))
        rig.step()
        assert [one.request.request_id for one in rig.scheduler.running] == ["0", "1"]
        rig.run()
        rig.check_idle()

    @pytest.mark.parametrize("tokens", [1, 2, 3])
    def test_a_budget_smaller_than_the_decoding_requests_starves_nobody(self, tokens: int) -> None:
        rig = Rig(tokens=tokens, running=8)
        finished(rig, *(request(str(number), text(3, 10 * number), max_tokens=5) for number in range(8)))

    def test_images_beyond_the_patch_budget_wait_for_the_next_step(self) -> None:
        rig = Rig(tokens=100, patches=8)
        asked = prompt(1, image(1), image(2), 2, image(3), 3)
        finished(rig, request("a", asked, max_tokens=1))
        assert rig.steps == [[("a", 0, 10)], [("a", 10, 15)]]

    def test_text_before_a_waiting_image_is_read_already(self) -> None:
        rig = Rig(tokens=100, patches=4)
        finished(rig, request("a", prompt(image(1), 1, 2, 3, image(2), 4), max_tokens=1))
        assert rig.steps == [[("a", 0, 7)], [("a", 7, 12)]]

    def test_an_image_larger_than_the_patch_budget_is_encoded_alone(self) -> None:
        rig = Rig(tokens=100, patches=8)
        large, small = image(1, rows=4, patches=50), image(2)
        rig.add(request("large", prompt(1, large, 2)), request("small", prompt(3, small, 4)))
        assert len(rig.step().images_to_encode) == 1
        assert len(rig.step().images_to_encode) == 1
        rig.run()
        assert rig.encoded == [large.digest, small.digest]

    def test_a_large_image_waits_for_the_images_before_it(self) -> None:
        rig = Rig(tokens=100, patches=8)
        large, small = image(1, rows=4, patches=50), image(2)
        finished(rig, request("small", prompt(3, small, 4)), request("large", prompt(1, large, 2)))
        assert rig.encoded == [small.digest, large.digest]


class TestImages:
    @pytest.mark.parametrize("tokens", [1, 2, 3, 5])
    @pytest.mark.parametrize("feature_bytes", [0, 1 << 20])
    def test_an_image_may_span_chunks_and_is_encoded_once(self, tokens: int, feature_bytes: int) -> None:
        rig = Rig(tokens=tokens, feature_bytes=feature_bytes)
        finished(rig, request("a", prompt(1, image(1, rows=7), 2, image(2, rows=3), 3), max_tokens=2))
        assert len(rig.encoded) == 2

    @pytest.mark.parametrize("tokens", [1, 2, 5, 100])
    def test_the_tiles_of_an_image_get_its_rows_in_order(self, tokens: int) -> None:
        rig = Rig(tokens=tokens)
        picture = image(1, rows=9)
        finished(rig, request("a", prompt(1, Tiled(picture, (4, 2, 3)), 2, image(2), Tiled(picture, (9,)), 3)))
        finished(rig, request("b", prompt(Tiled(picture, (4, 5)), 2)))
        assert rig.encoded == [picture.digest, image(2).digest]

    def test_equal_images_of_one_step_are_encoded_once(self) -> None:
        rig = Rig(tokens=100, patches=4, feature_bytes=0)
        rig.add(request("a", prompt(1, image(1), 2, image(1), 3)), request("b", prompt(4, image(1), 5)))
        step = rig.step()
        assert [[number for _, number in wanting] for wanting in step.images_to_encode.values()] == [[0, 1, 0]]
        rig.run()
        assert len(rig.encoded) == 1

    def test_an_image_seen_before_is_not_encoded_again(self) -> None:
        rig = Rig(prefix_cache=False)
        finished(rig, request("a", prompt(1, image(1), 2)))
        finished(rig, request("b", prompt(3, 4, image(1), 5)))
        assert len(rig.encoded) == 1

    @pytest.mark.parametrize("prefix_cache", [False, True])
    @pytest.mark.parametrize("page_size", [2, 3, 4, 5])
    @pytest.mark.parametrize("running", [1, 2, 4, 8])
    @pytest.mark.parametrize("tokens", [6, 100])
    def test_requests_that_come_one_image_after_the_other_need_room_for_one(
        self, tokens: int, running: int, page_size: int, prefix_cache: bool
    ) -> None:
        caches = {"page_size": page_size, "prefix_cache": prefix_cache, "feature_bytes": 5 * 8}
        rig = Rig(tokens=tokens, running=running, pages=64, **caches)
        asked = [prompt(1, image(number, rows=5), 10 + row) for number in range(4) for row in range(5)]
        finished(rig, *(request(str(number), one, max_tokens=2) for number, one in enumerate(asked)))
        assert len(rig.encoded) == 4

    def test_tenants_do_not_share_encoded_images(self) -> None:
        rig = Rig(tokens=100)
        rig.add(request("a", prompt(1, image(1), 2), salt="a"), request("b", prompt(1, image(1), 2), salt="b"))
        assert len(rig.step().images_to_encode) == 2
        rig.run()

    def test_a_prefix_that_ends_inside_an_image_needs_the_image_only_for_its_rest(self) -> None:
        rig = Rig(tokens=100, page_size=4)
        picture = image(1, rows=7)
        finished(rig, request("a", prompt(1, picture, 2), max_tokens=1))
        finished(rig, request("b", prompt(1, picture, 3), max_tokens=1))
        assert rig.steps[-1] == [("b", 8, 9)]
        finished(rig, request("c", prompt(1, picture), max_tokens=1))  # its last row is needed for the logits
        assert rig.steps[-1] == [("c", 4, 8)]
        assert len(rig.encoded) == 1

    def test_features_are_dropped_when_their_last_row_is_computed(self) -> None:
        rig = Rig(tokens=4)
        rig.add(request("a", prompt(image(1, rows=6), 1, 2, 3)))
        rig.step()
        assert list(rig.alive["a"].features) == [0]
        rig.step()
        assert rig.alive["a"].features == {}


class TestPrefixes:
    def test_a_known_beginning_is_not_computed_again(self) -> None:
        rig = Rig(tokens=100, page_size=4)
        finished(rig, request("a", text(10), max_tokens=1))
        finished(rig, request("b", prompt(*range(10), 50, 51), max_tokens=1))
        assert rig.steps == [[("a", 0, 10)], [("b", 8, 12)]]

    def test_an_answer_is_known_to_the_next_turn(self) -> None:
        rig = Rig(tokens=100, page_size=4)
        finished(rig, request("a", text(6), max_tokens=6))
        finished(rig, request("b", prompt(*range(6), *rig.answers["a"], 60), max_tokens=1))
        assert rig.steps[-1] == [("b", 8, 13)]

    def test_who_shares_a_beginning_that_is_being_computed_waits_and_then_uses_it(self) -> None:
        rig = Rig(tokens=4, page_size=4)
        finished(
            rig,
            request("first", prompt(*range(8), 50), max_tokens=1),
            request("second", prompt(*range(8), 60), max_tokens=1),
        )
        assert rig.steps == [[("first", 0, 4)], [("first", 4, 8)], [("first", 8, 9), ("second", 8, 9)]]

    def test_who_waits_for_a_beginning_holds_up_nobody_else(self) -> None:
        rig = Rig(tokens=100, page_size=4)
        finished(rig, request("first", text(6)), request("second", text(6)), request("other", text(4, 50)))
        assert rig.steps[:2] == [
            [("first", 0, 6), ("other", 0, 4)],
            [("first", 6, 7), ("other", 4, 5), ("second", 4, 6)],
        ]

    def test_a_beginning_whose_reader_was_aborted_is_computed_by_the_next(self) -> None:
        rig = Rig(tokens=4, page_size=4)
        rig.add(request("first", text(20), max_tokens=1), request("second", text(20), max_tokens=1))
        rig.step()
        rig.abort("first")
        rig.run()
        assert rig.steps == [[("first", 0, 4)], *([("second", start, start + 4)] for start in (4, 8, 12, 16))]

    def test_equal_prompts_of_tenants_do_not_wait_for_each_other(self) -> None:
        rig = Rig(tokens=100)
        finished(rig, request("a", text(12), salt="a"), request("b", text(12), salt="b"))
        assert rig.steps[0] == [("a", 0, 12), ("b", 0, 12)]

    def test_without_a_prefix_cache_nothing_is_shared(self) -> None:
        rig = Rig(tokens=100, prefix_cache=False)
        finished(rig, request("a", text(12)), request("b", text(12)))
        assert rig.steps[0] == [("a", 0, 12), ("b", 0, 12)]

    def test_the_cache_is_not_emptied_for_a_request_that_would_not_fit_anyway(self) -> None:
        rig = Rig(tokens=100, pages=8, page_size=4, running=4)
        finished(rig, request("known", text(8), max_tokens=1))
        rig.add(request("long", text(16, 20), max_tokens=4), request("large", text(24, 50), max_tokens=1))
        rig.step()
        assert [one.request.request_id for one in rig.scheduler.waiting] == ["large"]
        assert len(rig.cache.match([*range(8), 0], "")[0]) == 2  # type: ignore[union-attr]
        rig.run()
        rig.check_idle()


class TestPreemption:
    @pytest.mark.parametrize("prefix_cache", [False, True])
    def test_the_youngest_gives_its_pages_up_and_ends_with_the_same_answer(self, prefix_cache: bool) -> None:
        rig = Rig(tokens=100, pages=6, page_size=4, prefix_cache=prefix_cache)
        rig.add(request("old", text(8), max_tokens=10), request("young", text(8, 30), max_tokens=10))
        while len(rig.scheduler.running) < 2:
            rig.step()
        while len(rig.scheduler.running) == 2:
            rig.step()
        assert [one.request.request_id for one in rig.scheduler.waiting] == ["young"]
        assert 0 < len(rig.answers["young"]) < 10
        rig.run()
        assert rig.answers["old"] == continuation(text(8), 10)
        assert rig.answers["young"] == continuation(text(8, 30), 10)
        rig.check_idle()

    def test_nobody_who_was_put_back_is_overtaken(self) -> None:
        rig = Rig(tokens=100, pages=9, page_size=2, prefix_cache=False, running=3)
        rig.add(*(request(name, text(5, 20 * first), max_tokens=12) for first, name in enumerate("abcd")))
        put_back = 0
        while rig.alive:
            rig.step()
            running = [one.order for one in rig.scheduler.running]
            waiting = [one.order for one in rig.scheduler.waiting]
            assert waiting == sorted(waiting)
            assert not running or not waiting or max(running) < min(waiting)
            put_back += sum(bool(one.output_ids) for one in rig.scheduler.waiting)
        assert put_back > 0
        rig.check_idle()

    def test_who_is_put_back_queues_behind_an_older_one_that_waits_for_a_neighbours_page(self) -> None:
        rig = Rig(tokens=20, patches=4, pages=5, page_size=4)
        slow = prompt(image(1), image(2), image(3), 7)
        rig.add(request("first", slow), request("waits", slow), request("young", text(3), max_tokens=9))
        while len(rig.scheduler.running) != 1:
            rig.step()
        assert [one.request.request_id for one in rig.scheduler.waiting] == ["waits", "young"]
        rig.run()
        rig.check_idle()

    @pytest.mark.parametrize("feature_bytes", [0, 1 << 20])
    def test_images_come_back_too(self, feature_bytes: int) -> None:
        rig = Rig(tokens=6, pages=7, page_size=4, prefix_cache=False, feature_bytes=feature_bytes)
        finished(
            rig,
            request("old", prompt(1, image(1, rows=6), 2), max_tokens=12),
            request("young", prompt(3, image(2, rows=6), 4), max_tokens=12),
        )
        assert len(rig.encoded) == (3 if feature_bytes == 0 else 2)

    def test_one_request_may_fill_all_pages(self) -> None:
        rig = Rig(tokens=5, pages=4, page_size=4)
        finished(rig, request("a", text(10), max_tokens=6), request("b", text(12, 40), max_tokens=4))


class TestAborts:
    @pytest.mark.parametrize("phase", ["waiting", "prefill", "decode", "preempted"])
    @pytest.mark.parametrize("prefix_cache", [False, True])
    def test_an_abort_frees_everything_in_every_phase(self, phase: str, prefix_cache: bool) -> None:
        rig = Rig(tokens=6, pages=8, page_size=4, running=2, prefix_cache=prefix_cache)
        rig.add(request("neighbour", prompt(1, image(1), 2), max_tokens=9))
        rig.add(request("aborted", prompt(3, image(2, rows=12), 4), max_tokens=9))
        aborted = rig.alive["aborted"]
        reached = {
            "waiting": lambda: True,
            "prefill": lambda: aborted.computed > 0 and aborted.features != {},
            "decode": lambda: len(aborted.output_ids) >= 2,
            "preempted": lambda: aborted in rig.scheduler.waiting and len(aborted.output_ids) > 0,
        }[phase]
        while not reached():
            rig.step()
        rig.abort("aborted")
        assert aborted.features == {}
        rig.run()
        assert rig.answers["neighbour"] == continuation(prompt(1, image(1), 2), 9)
        rig.check_idle()


def rows(count: int, length: int = 20, max_tokens: int = 30) -> list[Request]:
    """Requests of a batch, none of which begins like another."""
    return [request(f"row {number}", text(length, 1000 * number), max_tokens, batch=True) for number in range(count)]


def steps_to_first_token(rig: Rig, asked: Request) -> int:
    rig.add(asked)
    for count in range(1, 1000):
        rig.step()
        if rig.answers[asked.request_id]:
            return count
    raise AssertionError("no first token")


class TestBatch:
    @pytest.mark.parametrize("asked", [text(12, 70_000), text(60, 70_000), prompt(1, image(1), 2, image(2), 3)])
    @pytest.mark.parametrize("options", [{}, {"running": 1}, {"pages": 24}, {"prefix_cache": False}])
    def test_the_first_token_takes_no_more_steps_than_alone(self, asked: Asked, options: dict[str, int]) -> None:
        """Places and pages are all a batch's, and more of it waits."""
        tight = {"tokens": 16, "running": 4, "pages": 48, "page_size": 4, **options}
        alone = steps_to_first_token(Rig(**tight), request("client", asked))  # type: ignore[arg-type]
        rig = Rig(**tight)  # type: ignore[arg-type]
        rig.add(*rows(12))
        for _ in range(20):
            rig.step()
        assert not any(name == "client" for name, *_ in rig.steps[-1])
        assert steps_to_first_token(rig, request("client", asked)) == alone
        assert rig.steps[20][0][:2] == ("client", 0)  # in the very next step
        rig.run()
        rig.check_idle()
        assert all(rig.answers[one.request_id] == continuation(one, one.max_tokens) for one in rows(12))

    def test_a_batch_alone_runs_as_anybody(self) -> None:
        def steps(batch: bool) -> list[list[tuple[str, int, int]]]:
            rig = Rig(tokens=8, patches=6, pages=20)
            for number in range(6):
                asked = prompt(number, image(number % 2), *range(100 * number, 100 * number + 9))
                rig.add(request(str(number), asked, max_tokens=9, batch=batch))
            rig.run()
            return rig.steps

        assert steps(True) == steps(False)

    def test_it_gets_nothing_beside_a_prompt_and_short_steps_while_others_are_about(self) -> None:
        rig = Rig(tokens=16, patches=8, running=8, pages=200)
        rig.add(request("client", text(20, 70_000), max_tokens=9), *rows(4, length=40, max_tokens=20))
        rig.run()
        assert rig.steps[:2] == [[("client", 0, 16)], [("client", 16, 20)]]
        sums = [sum(stop - start for name, start, stop in step if name != "client") for step in rig.steps[2:]]
        with_client, alone = sums[:8], sums[8:]
        assert max(with_client) == 4
        assert max(alone[:15]) == 4  # the client may come back
        assert alone[15] == 16

    def test_a_quarter_of_what_is_read_is_its_own_while_others_come_and_go(self) -> None:
        rig = Rig(tokens=16, patches=8, running=8, pages=200, prefix_cache=False, feature_bytes=0)
        asked = {"client": [0] * 2, "row": [0] * 2}  # tokens and images read
        for number in range(400):
            for kind, batch in (("row", True), ("client", False)):
                if sum(name.startswith(kind) for name in rig.alive) < (4 if batch else 2):
                    parts = prompt(number, image(2 * number + batch), *range(9))
                    rig.add(request(f"{kind} {number}", parts, max_tokens=3 + number % 5, batch=batch))
            step = rig.step()
            for chunk in step.chunks:
                asked[chunk.sequence.request.request_id.split()[0]][0] += chunk.tokens if chunk.reads else 0
            for wanting in step.images_to_encode.values():
                asked[wanting[0][0].request.request_id.split()[0]][1] += 1
        for clients, of_batch in zip(asked["client"], asked["row"], strict=True):
            assert 0.2 < of_batch / (clients + of_batch) < 0.27

    def test_its_places_and_pages_go_first_the_youngest_of_them(self) -> None:
        rig = Rig(tokens=64, running=3, pages=40)
        rig.add(*rows(3))
        rig.step()
        rig.add(request("a", text(8, 70_000)), request("b", text(8, 80_000)))
        rig.step()
        assert [one.request.request_id for one in rig.scheduler.running] == ["row 0", "a", "b"]
        assert [one.request.request_id for one in rig.scheduler.waiting] == ["row 1", "row 2"]
        rig.run()

    def test_a_growing_client_takes_pages_of_an_older_row(self) -> None:
        rig = Rig(tokens=64, pages=9, page_size=4, prefix_cache=False)
        rig.add(*rows(1, length=12, max_tokens=8))
        rig.step()
        finished(rig, request("client", text(12, 70_000), max_tokens=20))
        assert rig.answers["row 0"] == continuation(rows(1, 12)[0], 8)

    def test_nobody_waits_for_a_page_that_a_row_computes(self) -> None:
        rig = Rig(tokens=8, page_size=4)
        rig.add(request("row", text(20), batch=True))
        rig.step()
        assert steps_to_first_token(rig, request("client", text(20), max_tokens=1)) == 2  # 8 tokens were there
        rig.run()
        rig.check_idle()

    @pytest.mark.parametrize("options", [{}, {"running": 1}, {"pages": 6, "page_size": 4}])
    def test_a_batch_ends_however_busy_the_others_are(self, options: dict[str, int]) -> None:
        """Every step has prompts to read, more than it can."""
        rig = Rig(**{"tokens": 8, "running": 3, **options})  # type: ignore[arg-type]
        rig.add(*rows(3, length=10, max_tokens=3))
        for number in range(2000):
            if len(rig.scheduler.waiting) < 6:
                rig.add(request(f"client {number}", text(10, 50_000 + 20 * number), max_tokens=2))
            rig.step()
            if not any(name.startswith("row") for name in rig.alive):
                break
        else:
            raise AssertionError("the batch starved")
        assert number > 100  # it did not push in
        rig.run()
        rig.check_idle()


PICTURES = [image(1, rows=1, patches=2), image(2, rows=3, patches=4), Tiled(image(3, rows=6, patches=20), (2, 4))]


@dataclass(frozen=True)
class Plan:
    """One request of a random workload: when it comes, and when it is aborted if it still runs."""

    parts: tuple[Part, ...]
    max_tokens: int
    salt: str
    arrival: int
    abort: int | None
    batch: bool


PLANS = st.builds(
    Plan,
    parts=st.lists(st.integers(0, 1) | st.sampled_from(PICTURES), min_size=1, max_size=5).map(tuple),
    max_tokens=st.integers(1, 6),
    salt=st.sampled_from(["", "", "tenant"]),
    arrival=st.integers(0, 12),
    abort=st.none() | st.integers(0, 25),
    batch=st.booleans(),
)


class TestRandomWorkloads:
    @given(
        plans=st.lists(PLANS, min_size=1, max_size=8),
        tokens=st.integers(1, 12),
        patches=st.integers(1, 8),
        running=st.integers(1, 4),
        page_size=st.integers(1, 5),
        spare=st.integers(0, 30),
        prefix_cache=st.booleans(),
        feature_bytes=st.sampled_from([0, 60, 1 << 20]),
    )
    @settings(max_examples=75, deadline=None)
    def test_everyone_gets_the_right_answer_and_every_page_comes_back(
        self, plans: list[Plan], spare: int, **options: int
    ) -> None:
        """Tight in every respect: the KV cache holds the longest request and `spare` tokens more."""
        prompts = [prompt(*plan.parts) for plan in plans]
        longest = max(len(asked.token_ids) + plan.max_tokens for asked, plan in zip(prompts, plans, strict=True))
        rig = Rig(pages=-(-(longest + spare) // options["page_size"]), **options)  # type: ignore[arg-type]
        work = sum(len(asked.token_ids) + plan.max_tokens for asked, plan in zip(prompts, plans, strict=True))
        for now in range(26 + len(plans) * work):
            for number, plan in enumerate(plans):
                if plan.arrival == now:
                    rig.add(request(str(number), prompts[number], plan.max_tokens, plan.salt, plan.batch))
                if plan.abort == now and str(number) in rig.alive:
                    rig.abort(str(number))
            if rig.alive:
                rig.step()
        assert not rig.alive, "somebody starved"
        for number, plan in enumerate(plans):
            answer, right = rig.answers[str(number)], continuation(prompts[number], plan.max_tokens)
            assert answer == right or (plan.abort is not None and answer == right[: len(answer)])
        rig.check_idle()

    @given(plans=st.lists(PLANS, min_size=2, max_size=6), pages=st.integers(30, 40))
    @settings(max_examples=30, deadline=None)
    def test_the_same_arrivals_give_the_same_steps(self, plans: list[Plan], pages: int) -> None:
        def steps() -> list[list[tuple[str, int, int]]]:
            rig = Rig(pages=pages, page_size=2)
            rig.add(*(request(str(number), prompt(*plan.parts), plan.max_tokens) for number, plan in enumerate(plans)))
            rig.run()
            return rig.steps

        assert steps() == steps()
