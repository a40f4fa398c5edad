"""A decoder's blocks in one call give every bit of what they give one after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from test_quantised_language import drawn, language, quantised

from siglane.engine.attention.compiled import CompiledKernels, compiled_kernels
from siglane.engine.attention.kernels import DecodeRows, StepAttention
from siglane.engine.attention.plain import Prefill, Prefills
from siglane.engine.attention.runs import RunKernels
from siglane.engine.blocks import ROWS, CompiledBlocks, compiled_blocks
from siglane.engine.cache.kv import PagedKV
from siglane.engine.process.load import load_engine
from siglane.llm import LLM
from siglane.lm.qwen import QwenModel
from siglane.nn.cpu.jit.entrance import compiled_layer
from siglane.nn.quantise import Bits
from siglane.settings.engine import EngineConfig
from siglane.types import SamplingParams

PAGE, COLUMNS = 4, 5
WHOLE: dict[str, Any] = {  # of whole registers, as compiled loops need them
    "model_type": "qwen2", "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "head_dim": 32,
}  # fmt: skip


@pytest.fixture(autouse=True)
def compiled() -> None:
    if compiled_layer() is None:
        pytest.skip("needs llvmlite and AVX2")


class Step(NamedTuple):
    """Rows, one token each of as many sequences of which each has pages of its own, in no order."""

    x: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    decodes: DecodeRows

    @classmethod
    def drawn(cls, rows: int) -> Step:
        generator = torch.Generator().manual_seed(rows)
        table = 1 + torch.randperm(ROWS * COLUMNS, generator=generator).view(ROWS, COLUMNS).int()
        own = torch.randperm(ROWS, generator=generator)[:rows]
        positions = torch.randint(PAGE * COLUMNS, (rows,), generator=generator)
        slots = table[own, positions // PAGE].long() * PAGE + positions % PAGE
        x = torch.randn(rows, WHOLE["hidden_size"], generator=generator)
        return cls(x, positions, slots, DecodeRows(table, own, positions + 1, ()))


def kernels(model: QwenModel, kept: torch.dtype = torch.float16) -> CompiledKernels:
    """Over a cache whose tokens were drawn."""
    kv = PagedKV(
        model.config,
        model.kv_heads,
        pages=ROWS * COLUMNS,
        page_size=PAGE,
        dtype=kept,
        device=torch.device("cpu"),
    )
    for seed, cache in enumerate((kv.keys, kv.values)):
        cache.copy_(drawn(*cache.shape, seed=seed))
    made = compiled_kernels(kv, model)
    assert made is not None
    return made


def one_by_one(model: QwenModel, own: CompiledKernels, step: Step) -> torch.Tensor:
    attention = StepAttention(own, step.slots, len(step.x), own.decode(step.decodes), None)
    return model.decode(step.x, step.positions, attention)


@torch.inference_mode()
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "kind", [{}, {"model_type": "qwen3"}, {"all_biased": True}], ids=["qwen2", "qwen3", "all biased"]
)
@pytest.mark.parametrize(("bits", "kept"), [("8bit", torch.float16), ("4bit", torch.float16), ("8bit", torch.float32)])
def test_steps_of_every_size(bits: Bits, kept: torch.dtype, kind: dict[str, Any], threads: int) -> None:
    model = quantised(language(WHOLE | kind), bits)
    together, alone = kernels(model, kept), kernels(model, kept)
    blocks = compiled_blocks(model, together)
    assert isinstance(blocks, CompiledBlocks)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in (1, 2, 3, 8, blocks.most, 5, 1):
            step = Step.drawn(rows)
            assert torch.equal(blocks(*step), one_by_one(model, alone, step))
            for cache, expected in ((together.kv.keys, alone.kv.keys), (together.kv.values, alone.kv.values)):
                assert torch.equal(cache, expected)
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def test_a_broken_row_breaks_no_other() -> None:
    model = quantised(language(WHOLE))
    blocks = compiled_blocks(model, kernels(model))
    assert blocks is not None
    step = Step.drawn(4)
    whole = blocks(*step)
    step.x[2, 7] = torch.inf
    broken = blocks(*step)
    assert broken[2].isnan().all()
    assert torch.equal(broken[[0, 1, 3]], whole[[0, 1, 3]])


def in_floats(model: QwenModel) -> QwenModel:
    return model


@pytest.mark.parametrize(
    ("kind", "change"),
    [({}, in_floats), ({"intermediate_size": 96}, quantised)],
    ids=["floats", "gates that are no whole blocks"],
)
def test_what_is_more_goes_block_by_block(kind: dict[str, Any], change: Callable[[QwenModel], QwenModel]) -> None:
    model = change(language(WHOLE | kind))
    own = kernels(model)
    assert compiled_blocks(model, own) is None
    whole = quantised(language(WHOLE))
    assert compiled_blocks(whole, RunKernels(own.kv)) is None


def test_an_engine_answers_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped model, one request: how several share steps is a matter of time."""
    params, sizes, through = (
        SamplingParams(max_tokens=24, logprobs=2, ignore_eos=True),
        list[int](),
        CompiledBlocks.__call__,
    )

    def counted(self: CompiledBlocks, x: torch.Tensor, *others: Any) -> torch.Tensor:
        sizes.append(len(x))
        return through(self, x, *others)

    def answered() -> list[Any]:
        (answer,) = LLM("demo", device="cpu", quantization="8bit", kv_tokens=2048).generate("What is this?", params)
        return list(answer.logprobs)

    monkeypatch.setattr(CompiledBlocks, "__call__", counted)
    found = answered()
    assert sizes == [1] * (len(found) - 1)
    monkeypatch.setattr("siglane.engine.device.compiled_blocks", lambda model, kernels: None)
    assert answered() == found


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"quantization": "8bit"}, torch.float16),
        ({"quantization": "8bit", "paged_backend": "torch"}, torch.float32),
        ({"quantization": "8bit", "attention_backend": "eager"}, torch.float32),
        ({}, torch.float32),
    ],
    ids=["8 bits", "8 bits, torch", "8 bits, eager", "floats"],
)
def test_keys_and_values_take_half_beside_fewer_bits(options: dict[str, Any], kept: torch.dtype) -> None:
    runner = load_engine("demo", EngineConfig(device="cpu", kv_tokens=1024, **options)).runner
    assert runner.kv.keys.dtype == runner.kv.values.dtype == kept
    assert runner.dtype == torch.float32
    assert runner.kv.bytes_per_token == 2 * runner.kv.keys[:, 0, 0].numel() * kept.itemsize


@torch.inference_mode()
@pytest.mark.parametrize("kind", [{}, {"model_type": "qwen3"}], ids=["qwen2", "qwen3"])
def test_halves_change_little(kind: dict[str, Any]) -> None:
    model, step = quantised(language(WHOLE | kind)), Step.drawn(4)
    whole, half = (one_by_one(model, kernels(model, kept), step) for kept in (torch.float32, torch.float16))
    assert 0 < (half - whole).abs().max() < 2e-2 * whole.abs().max()


@torch.inference_mode()
def test_a_prompt_sees_its_keys_as_they_are_kept() -> None:
    """It answers alike whether its beginning was computed with it or read from the cache."""
    own, count = kernels(language(WHOLE)), 12
    q, k, v = (drawn(count, heads, 32, seed=seed) for seed, heads in enumerate((4, 2, 2)))
    own.store(0, torch.arange(PAGE, PAGE + count), k, v)
    causal = torch.ones(count, count, dtype=torch.bool).tril()
    computed, read = (
        Prefills(own.kv, (Prefill(0, count, slice(PAGE, PAGE + count), mask),))(0, q, k, v) for mask in (None, causal)
    )
    assert torch.allclose(computed, read, rtol=0, atol=1e-6)
