"""Stages of `gpu_report.py` that run a whole engine: whether its answers are right, whatever happens, and how fast."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_models import (
    QWEN_1_5B,
    SO400M,
    TINY,
    TINY_TOWER,
    answers_of,
    engine_of,
    eyes,
    picture,
    question,
    random_model,
    request,
    tuned,
)  # fmt: skip
from gpu_place import Place, goal, part, say

from siglane.engine.engine import Engine
from siglane.engine.graphs import Recording, capture_on_cuda
from siglane.types import Request

ANSWER = 24
MANY = [request(number, 20 + 9 * number, ANSWER, TINY.vocab_size) for number in range(6)]
SHORTAGE = 40  # tokens of a forward from which on there is no memory, where that is tried


def answers(place: Place) -> None:
    """A tiny model of random weights: on the CPU, in graphs and without, alone and beside others."""
    wide = place._replace(dtype=torch.float32)
    with part("float32"):
        cpu, here = random_model(TINY, Place(torch.device("cpu"), torch.float32, True)), random_model(TINY, wide)
        here.load_state_dict(cpu.state_dict())
        expected = answers_of(engine_of(tuned(cpu), 8, 128), MANY)
        found = answers_of(engine_of(tuned(here), 8, 128), MANY)
        equal = sum(found[one] == expected[one] for one in found)
        goal("greedy answers in float32 are the CPU's", equal, "6", found == expected)
        for check in (poison, abort, shortage):  # in half precision steps of other sizes may round a tie otherwise
            with part(check.__name__):
                check(engine_of(here, 8, 128), found)
    half = tuned(random_model(TINY, place))
    recorded = engine_of(half, 8, 128)
    say(what="captured", buckets=list(recorded.runner.recorded))
    if not place.small:
        goal("every size was captured", list(recorded.runner.recorded), "1 to 8", len(recorded.runner.recorded) == 4)
    expected = answers_of(recorded, MANY)
    with part("graphs"):
        plain = engine_of(half, 8, 128)
        plain.runner.record(lambda step, pool: Recording(step, pool))  # the same steps, each anew
        found = answers_of(plain, MANY)
        goal("answers of graphs are those of the same kernels without", found == expected, "true", found == expected)
    with part("seeds"):
        hot = [request(number, 20, ANSWER, TINY.vocab_size, temperature=1.0) for number in range(4)]
        together = answers_of(recorded, hot)
        alone = [answers_of(recorded, [one])[one.request_id] == together[one.request_id] for one in hot]
        say(what="seeds alone and beside others", equal=sum(alone), of=len(alone))
    if not place.small:
        with part("batch_invariant"):
            invariant(place)
    with part("preemption"):  # pages for two of the six: the others are put off and begin anew
        found = answers_of(engine_of(half, 2, 32), MANY)
        say(what="answers after preemption", equal=sum(found[one] == expected[one] for one in found), of=len(found))
        lengths = sorted({len(one) for one in found.values()})
        goal("tokens of every answer", lengths, f"[{ANSWER}]", lengths == [ANSWER])
    with part("poison"):
        poison(engine_of(half, 8, 128), expected)
    if not place.small:
        with part("capture"):
            cost_of_graphs(recorded)


def invariant(place: Place) -> None:
    """Seeded answers beside others against those alone, behind a cached prefix, and put off and begun anew."""
    model = tuned(random_model(TINY, place), batch_invariant=True)
    hot = [request(number, 20 + 9 * number, ANSWER, TINY.vocab_size, temperature=1.0) for number in range(6)]
    engine = engine_of(model, 8, 128, batch_invariant=True)
    together = answers_of(engine, hot)
    alone = {one.request_id: answers_of(engine_of(model, 1, 128, True), [one])[one.request_id] for one in hot}
    again, squeezed = answers_of(engine, hot), answers_of(engine_of(model, 2, 32, True), hot)
    for name, found in (("alone", alone), ("behind a prefix", again), ("after preemption", squeezed)):
        equal = sum(found[one] == together[one] for one in together)
        goal(f"batch_invariant, answers {name} as beside others", equal, "6", equal == 6)


def poison(engine: Engine, expected: dict[str, list[int]]) -> None:
    """NaN in every page before anything is written there."""
    for cache in (engine.runner.kv.keys, engine.runner.kv.values):
        cache.fill_(torch.nan)
    found = answers_of(engine, MANY)
    goal("answers with NaN in all free pages", found == expected, "those without", found == expected)


def abort(engine: Engine, expected: dict[str, list[int]]) -> None:
    """Two of six after a few steps."""
    for one in MANY:
        engine.add(one)
    found: dict[str, list[int]] = {one.request_id: [] for one in MANY}
    for step in range(4 * ANSWER):
        for delta in engine.step() if engine.has_work else []:
            found[delta.request_id] += [] if delta.token_id is None else [delta.token_id]
        if step == 5:
            engine.abort("1")
            engine.abort("4")
    others = [name for name in found if name not in ("1", "4")]
    equal = sum(found[name] == expected[name] for name in others)
    freed = engine.stats().running == 0 and all(len(found[name]) < ANSWER for name in ("1", "4"))
    goal("answers beside two that are aborted", equal, "4", equal == 4 and freed)


def shortage(engine: Engine, expected: dict[str, list[int]]) -> None:
    """The allocator really refuses, in every forward of many tokens: requests of few are answered all the same."""
    device = engine.runner.device

    def refuse(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if len(inputs[0]) > SHORTAGE:
            torch.empty(1 << 50, dtype=torch.uint8, device=device)

    hook = engine.runner.model.language.blocks[1].register_forward_pre_hook(refuse)
    found, failed = tried(engine, MANY)
    short = {one.request_id for one in MANY if len(one.prompt.token_ids) <= SHORTAGE}
    right = all(found[name] == expected[name] for name in short) and failed == {*expected} - short
    goal("out of memory ends those who need it", sorted(failed), f"all but {sorted(short)}, whose answers stay", right)
    hook.remove()
    again, failed = tried(engine, MANY)
    equal = sum(again[one] == expected[one] for one in expected)
    goal("the engine answers all afterwards", equal, "6", equal == 6 and not failed)


def tried(engine: Engine, requests: list[Request]) -> tuple[dict[str, list[int]], set[str]]:
    """Answers, and who ended with an error."""
    for one in requests:
        engine.add(one)
    found: dict[str, list[int]] = {one.request_id: [] for one in requests}
    failed = set[str]()
    while engine.has_work:
        for delta in engine.step():
            found[delta.request_id] += [] if delta.token_id is None else [delta.token_id]
            if delta.finished is not None and delta.finished.reason == "error":
                failed.add(delta.request_id)
    return found, failed


def cost_of_graphs(engine: Engine) -> None:
    """Seconds and memory of a second capture, its pool and what the driver keeps."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, begin = torch.cuda.mem_get_info()[0], time.perf_counter()
    kept = engine.runner.recorded
    engine.runner.record(capture_on_cuda)
    torch.cuda.synchronize()
    seconds, taken = time.perf_counter() - begin, free - torch.cuda.mem_get_info()[0]
    say(what="capture", sizes=list(engine.runner.recorded), seconds=round(seconds, 2), mib=round(taken / 2**20, 1))
    del kept


class Busy:
    """Time that the device works on what a function enqueues, from its first operation to its last."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._spans = device, list[tuple[torch.cuda.Event, torch.cuda.Event]]()

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        if self._device.type != "cuda":
            return call

        def run(*arguments: Any) -> Any:
            span = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            span[0].record()
            result = call(*arguments)
            span[1].record()
            self._spans.append(span)
            return result

        return run

    @property
    def seconds(self) -> float | None:
        """None on a CPU."""
        if self._device.type != "cuda":
            return None
        torch.cuda.synchronize(self._device)
        return sum(first.elapsed_time(last) for first, last in self._spans) / 1e3


def engine(place: Place) -> None:
    """Requests of a picture and a question, all at once."""
    language, vision, count, words, answer = (
        (TINY, TINY_TOWER, 8, 8, 16) if place.small else (QWEN_1_5B, SO400M, 64, 256, 128)
    )
    columns = 4 if place.small else 28
    facts, rows = eyes(vision, language.hidden_size, columns), columns**2 // 4
    model = tuned(random_model(language, place, facts))
    served = engine_of(model, count, words + rows + answer)
    asked = [
        question(number, picture(facts, number), words, answer, language.vocab_size) for number in range(count + 1)
    ]
    answers_of(served, asked[count:])  # the first of its kind
    busy, runner = Busy(place.device), served.runner
    runner.forward, runner.encode = busy.timed(runner.forward), busy.timed(runner.encode)  # type: ignore[method-assign]
    runner.choose = busy.timed(runner.choose)
    begin, first, steps = time.perf_counter(), dict[str, float](), 0
    for one in asked[:count]:
        served.add(one)
    while served.has_work:
        steps += 1
        for delta in served.step():
            first.setdefault(delta.request_id, time.perf_counter() - begin)
    seconds, waits, worked = time.perf_counter() - begin, sorted(first.values()), busy.seconds
    found: dict[str, Any] = {"tokens_per_second": round(count * answer / seconds), "steps": steps}
    found |= {"images_per_second": round(count / seconds, 1), "prompt_tokens": words + rows + 1}
    found |= {f"first_token_p{share}": round(waits[share * (count - 1) // 100], 3) for share in (50, 99)}
    if worked is not None:
        host = round(1e3 * (seconds - worked) / steps, 3)
        found |= {"idle_percent": round(100 * (1 - worked / seconds), 1), "idle_ms_per_step": host}
        found |= {"peak_bytes": torch.cuda.max_memory_allocated(), "free_bytes": torch.cuda.mem_get_info()[0]}
        goal("a step leaves the device idle", f"{host} ms", "at most 1 ms", host <= 1)
    say(what="engine", **found)
    goal("every request got its first token", len(first), f"{count}", len(first) == count)
