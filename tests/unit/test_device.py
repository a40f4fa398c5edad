"""A step over static memory gives every bit that one made of its own numbers alone gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_kit import Asked
from test_engine import WIDE, Tiny, greedy, run, tokens

from siglane.engine.attention.kernels import Kernels
from siglane.engine.attention.plain import TorchKernels
from siglane.engine.attention.runs import RunKernels
from siglane.engine.batch import Chunk
from siglane.engine.cache.kv import SCRATCH_PAGES, PagedKV
from siglane.engine.device import Computed, Device, StepPlan
from siglane.engine.engine import Engine
from siglane.engine.graphs import Recording
from siglane.engine.limits import padded_rows
from siglane.engine.words import Held, PageTable, Written
from siglane.families.model import VisionLanguageModel, load_model
from siglane.families.processor import load_processor
from siglane.nn.cpu.optimise import optimise
from siglane.types import Prompt
from siglane.weights.hub import open_checkpoint

BUCKETS = (1, 2, 4, 8, 16)


@pytest.fixture(scope="module")
def tiny(nvila_folder: Any) -> Tiny:
    """Optimised, as it is served."""
    checkpoint = open_checkpoint(nvila_folder)
    processor = load_processor(checkpoint)
    model = load_model(checkpoint, processor.config, device="cpu", dtype=torch.float32)
    optimise(model)
    return Tiny(nvila_folder, model, processor)


@pytest.fixture(scope="module")
def prompts(tiny: Tiny) -> Mapping[str, Asked]:
    first = tiny.image(1)
    return MappingProxyType(
        {
            "text": tiny.prompt("What is this?"),
            "image": tiny.prompt("What is this?", first),
            "question": tiny.prompt("And where?", first),
            "tiles": tiny.prompt("Describe.", tiny.image(4, WIDE, alone=True)),
            "one token": Asked(Prompt((5,))),
            "loop": Asked(Prompt((7, 8, 9, 10) * 6)),
        }
    )


class Dynamic:
    """A step as it is written down: lists become tensors, each token attends to copies of what it sees, no memory is
    kept but keys and values."""

    def __init__(self, model: VisionLanguageModel, like: PagedKV) -> None:
        self.language, self.page_size = model.language, like.page_size
        self.keys, self.values = (torch.full_like(x.flatten(1, 2), torch.nan) for x in (like.keys, like.values))

    def logits(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        places = torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in chunks])
        embeds = self.language.embed_turned(torch.tensor([i for chunk in chunks for i in chunk.token_ids]))
        wanted, first = [], 0
        for chunk in chunks:
            for start, stop, image, row in chunk.spans:
                embeds[first + start : first + stop] = chunk.rows(image)[row : row + stop - start]
            first += chunk.tokens
            wanted += range(first - len(chunk.next_tokens), first)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            rows, first = [], 0
            for chunk in chunks:
                slots = torch.tensor([self.slot(chunk, position) for position in range(chunk.stop)])
                own = slice(first, first + chunk.tokens)
                for cache, new in ((self.keys, k), (self.values, v)):
                    cache[layer, slots[chunk.start :]] = new[own]
                rows.append(self.attend(chunk, q[own], self.keys[layer, slots], self.values[layer, slots]))
                first += chunk.tokens
            return torch.cat(rows)

        hidden = self.language.decode(embeds, places, attend)
        return self.language.logits(hidden[torch.tensor(wanted, dtype=torch.long)])

    def slot(self, chunk: Chunk, position: int) -> int:
        return chunk.sequence.block_table[position // self.page_size] * self.page_size + position % self.page_size

    @staticmethod
    def attend(chunk: Chunk, q: torch.Tensor, ks: torch.Tensor, vs: torch.Tensor) -> torch.Tensor:
        ks, vs = (x.transpose(0, 1)[None] for x in (ks, vs))
        if chunk.tokens == 1:
            grouped = q.view(1, ks.shape[1], -1, q.shape[-1])
            return F.scaled_dot_product_attention(grouped, ks, vs).reshape(q.shape)
        seen = None if chunk.start == 0 else torch.ones(chunk.tokens, chunk.stop, dtype=torch.bool).tril(chunk.start)
        qs, causal = q.transpose(0, 1)[None], seen is None
        rows = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=seen, is_causal=causal, enable_gqa=True)
        return rows[0].transpose(0, 1)


def watch(engine: Engine, dynamic: Dynamic, poison: bool) -> list[int | None]:
    """Compares every step, bit by bit; the sizes to which steps were padded. poison: NaN in the scratch page and in
    pages that are nobody's before each. A sequence in several runs of pages is read run by run, and one
    whose pages are gathered under a mask: those round otherwise."""
    device, buckets = engine.runner, []
    forward = device.forward

    def compared(plan: StepPlan) -> Computed:
        if poison:
            free = [page for page, taken in enumerate(engine.allocator._taken) if not taken]
            for cache in (device.kv.keys, device.kv.values):
                cache[:, [*range(SCRATCH_PAGES), *free]] = torch.nan
        computed = forward(plan)
        logits, expected = computed.logits, dynamic.logits(plan.chunks)
        buckets.append(plan.bucket)
        alike = all(len(chunk.sequence.runs()) == 1 for chunk in plan.chunks) and not device.kernels.records
        if not (torch.equal(logits, expected) if alike else torch.allclose(logits, expected, atol=1e-5)):
            raise torch.AcceleratorError("other bits")  # which no retry hides
        return computed

    device.forward = compared  # type: ignore[method-assign]
    return buckets


def pad(engine: Engine, kernels: Callable[[PagedKV], Kernels]) -> None:
    """Every step that only decodes."""
    now = engine.runner
    engine.runner = Device(now.model, now.kv, kernels(now.kv), now.limits, now.eos_token_ids, buckets=BUCKETS)


def recorded(kv: PagedKV) -> Kernels:
    """Whose decodes read nothing but tensors."""
    return TorchKernels(kv, records=True)


OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "small chunks": {"max_batch_tokens": 7},
    "a token a step": {"max_batch_tokens": 1},
    "pages of one": {"page_size": 1, "prefix_cache": False},
    "preemption": {"kv_tokens": 150, "page_size": 4},
    "guesses": {"num_speculative_tokens": 4, "page_size": 4},
    "few at once": {"max_running": 3, "max_batch_patches": 20, "max_batch_tokens": 11},
}


@pytest.mark.few("*-recorded", "plain-*", "guesses-*", "small chunks-padded")
@pytest.mark.parametrize(
    "kernels", [None, RunKernels, recorded], ids=["as many rows as there are", "padded", "recorded"]
)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_step_has_the_bits_of_a_dynamic_one(
    tiny: Tiny, prompts: Mapping[str, Asked], options: Mapping[str, Any], kernels: Callable[[PagedKV], Kernels] | None
) -> None:
    engine = tiny.engine(**options)
    if kernels is not None:
        pad(engine, kernels)
    put_back, preempt = [], engine.scheduler._preempt
    engine.scheduler._preempt = lambda one: (put_back.append(one), preempt(one))  # type: ignore[func-returns-value]
    buckets = watch(engine, Dynamic(tiny.model, engine.runner.kv), poison=True)
    names = [f"{name} {number}" for number in range(2) for name in prompts]
    requests = [greedy(name, prompts[name[:-2]], 4 + number) for number, name in enumerate(names)]
    for request in requests:
        engine.add(request)
    said: dict[str, list[int]] = {request.request_id: [] for request in requests}
    known = 0
    for step in range(400):
        if step == 6:
            engine.abort("tiles 0")
            engine.abort("image 1")
        for delta in engine.step() if engine.has_work else []:
            said[delta.request_id] += [] if delta.token_id is None else [delta.token_id]
            known += 0 if delta.finished is None else delta.finished.cached_tokens
    assert bool(known) == options.get("prefix_cache", True)
    assert bool(put_back) == ("kv_tokens" in options)
    sizes = {*buckets} - {None}
    assert (kernels is None) == (sizes == set())
    assert kernels is None or options or sizes == {*BUCKETS}
    for number, request in enumerate(requests):
        if request.request_id not in ("tiles 0", "image 1"):
            assert said[request.request_id] == tiny.reference(Asked(request.prompt, request.images), 4 + number)


def test_layers_see_few_numbers_of_rows(tiny: Tiny) -> None:
    """oneDNN makes and keeps a kernel for each."""
    sizes = {padded_rows(rows, "cpu") for rows in range(1, 513)}
    assert all(0 <= padded_rows(rows, "cpu") - rows <= rows // 5 for rows in range(1, 513))
    assert {padded_rows(rows, "cpu") for rows in range(1, 17)} == set(range(1, 17))
    assert len(sizes) == 60
    assert {padded_rows(rows, "cuda") for rows in range(1, 513)} == set(range(1, 513))
    engine, seen = tiny.engine(), list[int]()
    with tiny.model.language.blocks[0].register_forward_hook(lambda block, given, _: seen.append(len(given[0]))):
        run(engine, [greedy(str(n), Asked(Prompt(tuple(range(5, 22 + n)))), max_tokens=1) for n in range(9)])
    assert seen
    assert set(seen) <= sizes


def test_recorded_steps_are_replayed_and_have_the_same_bits(tiny: Tiny, prompts: Mapping[str, Asked]) -> None:
    """On CPUs nothing is captured; what is called is what a graph would hold."""
    engine, replayed = tiny.engine(), list[int]()
    pad(engine, recorded)

    def capture(step: Callable[[], torch.Tensor], pool: Any) -> Recording:
        size = len(step())

        def replay() -> torch.Tensor:
            replayed.append(size)
            return step()

        return Recording(replay, pool)

    engine.runner.record(capture)
    watch(engine, Dynamic(tiny.model, engine.runner.kv), poison=True)
    answers = run(engine, [greedy(name, prompt) for name, prompt in prompts.items()])
    assert tokens(answers) == {name: tiny.reference(prompt) for name, prompt in prompts.items()}
    assert {*replayed} == {4, 8}


def test_a_table_gets_what_is_new_and_forgets_who_left() -> None:
    table, first, second = PageTable(3, 8, torch.device("cpu")), [4, 5], [9]

    def put(*held: Held) -> tuple[list[int], list[int], list[int]]:
        news = table.news(held)
        assert table.news(held) == news  # known only when they are put
        table.put(held, *(torch.tensor(numbers, dtype=torch.int64) for numbers in news))
        assert table.news(held) == ([], [], [])
        return news

    assert put(Held(0, first, 2), Held(2, second, 1)) == ([0, 0, 2], [0, 1, 0], [4, 5, 9])
    first.append(6)
    assert put(Held(0, first, 3), Held(2, second, 1)) == ([0], [2], [6])
    assert table.pages.tolist() == [[4, 5, 6, 0, 0, 0, 0, 0], [0] * 8, [9, *[0] * 7]]
    assert put(Held(0, [4, 5, 7], 3)) == ([0] * 3, [0, 1, 2], [4, 5, 7])  # another sequence
    assert table.pages[0, :3].tolist() == [4, 5, 7]
    assert table.pages.dtype == torch.int32


def test_a_plan_waits_in_memory_that_the_next_one_does_not_touch() -> None:
    written, memory = [Written(8, torch.device("cpu")) for _ in range(2)], torch.zeros(8, dtype=torch.int64)
    written[0].write([[1, 2], [], [3]])
    written[1].write([[4]])
    assert [view.tolist() for view in written[0].copy_to(memory)] == [[1, 2], [], [3]]
    with pytest.raises(RuntimeError, match="9 numbers, 8 are planned for"):
        written[0].write([range(9)])
