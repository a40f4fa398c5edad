"""A decoder's blocks in one call give every bit of what they give one after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from test_quantised_language import drawn, language, quantised

from siglane.engine.attention.compiled import CompiledKernels, compiled_kernels
from siglane.engine.attention.kernels import DecodeRows, StepAttention
from siglane.engine.attention.runs import RunKernels
from siglane.engine.blocks import ROWS, CompiledBlocks, compiled_blocks
from siglane.engine.cache.kv import PagedKV
from siglane.llm import LLM
from siglane.lm.qwen import QwenModel
from siglane.nn.cpu.jit.entrance import compiled_layer
from siglane.nn.quantise import Bits
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


def kernels(model: QwenModel) -> CompiledKernels:
    """Over a cache whose tokens were drawn."""
    kv = PagedKV(
        model.config,
        model.kv_heads,
        pages=ROWS * COLUMNS,
        page_size=PAGE,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    for seed, cache in enumerate((kv.keys, kv.values)):
        cache.copy_(drawn(*cache.shape, seed=seed))
    made = compiled_kernels(kv, model.heads)
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
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_steps_of_every_size(bits: Bits, kind: dict[str, Any], threads: int) -> None:
    model = quantised(language(WHOLE | kind), bits)
    together, alone = kernels(model), kernels(model)
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
