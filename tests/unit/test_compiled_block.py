"""An 8-bit encoder block but for its attention in two calls, against its parts one after another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from siglane.nn.cpu.int8 import Int8Linear
from siglane.nn.cpu.int8_block import ByParts
from siglane.nn.cpu.jit.entrance import coded_block
from siglane.types import Activation

BLOCKS = {"whole": (64, 192), "a part of a block": (80, 172), "so400m's MLP": (1152, 4304)}  # width, MLP's width


@pytest.fixture(autouse=True)
def compiled() -> None:
    if coded_block("gelu_tanh") is None:
        pytest.skip("needs llvmlite and AVX2")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers(width: int, hidden: int) -> list[Int8Linear]:
    """qkv, out_proj, fc1, fc2"""
    shapes = ((3 * width, width), (width, width), (hidden, width), (width, hidden))
    return [
        Int8Linear(drawn(*shape, seed=n) * shape[1] ** -0.5, drawn(shape[0], seed=n + 9))
        for n, shape in enumerate(shapes)
    ]


def norm(width: int) -> nn.LayerNorm:
    made = nn.LayerNorm(width, 1e-6)
    made.weight.copy_(1 + 0.3 * drawn(width, seed=7))
    return made


@pytest.mark.few("gelu_tanh-*", "quick_gelu-whole-5", "quick_gelu-a part of a block-100", "silu-so400m's MLP-37")
@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 5, 37, 100])
@pytest.mark.parametrize("shape", BLOCKS.values(), ids=list(BLOCKS))
@pytest.mark.parametrize("activation", ["gelu_tanh", "quick_gelu", "silu"])
def test_it_is_its_parts(activation: Activation, shape: tuple[int, int], rows: int) -> None:
    width, hidden = shape
    qkv, *rest = layers(width, hidden)
    block, own = coded_block(activation), norm(width)
    assert block is not None
    parts = ByParts(activation, block.dtype)
    assert block.takes(qkv, *rest)
    x, attended = drawn(rows, width), drawn(rows, width, seed=1).to(block.dtype)
    x[0] *= 100
    expected, found = parts.heads(x, own, qkv), block.heads(x, own, qkv)
    assert torch.allclose(found.float(), expected.float(), rtol=0.01, atol=1e-4)  # bfloat16's last place
    expected, found = parts.rest(attended, x, own, *rest), block.rest(attended, x, own, *rest)
    assert (found - expected).norm(dim=1).le(1e-3 * expected.norm(dim=1)).all()  # a value between two codes


@torch.no_grad()
def test_neighbours_and_threads_change_nothing() -> None:
    qkv, *rest = layers(80, 172)
    block, own, before = coded_block("gelu_tanh"), norm(80), torch.get_num_threads()
    assert block is not None
    x, attended = drawn(100, 80), drawn(100, 80, seed=1).to(block.dtype)
    heads, y = block.heads(x, own, qkv), block.rest(attended, x, own, *rest)
    assert torch.equal(block.heads(x[50:53], own, qkv), heads[50:53])
    assert torch.equal(block.rest(attended[50:53], x[50:53], own, *rest), y[50:53])
    assert block.rest(attended[:0], x[:0], own, *rest).shape == (0, 80)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(block.rest(attended, x, own, *rest), y)
            assert torch.equal(block.heads(x, own, qkv), heads)
    finally:
        torch.set_num_threads(before)
    x[7, 3], attended[60, 2] = torch.nan, torch.inf
    spoilt = block.rest(attended, x, own, *rest)
    assert not spoilt[[7, 60]].isfinite().any()
    clean = torch.ones(100, dtype=torch.bool).index_fill_(0, torch.tensor([7, 60]), False)
    assert torch.equal(spoilt[clean], y[clean])


@torch.no_grad()
def test_results_that_end_within_a_register_are_not_taken() -> None:
    block = coded_block("gelu_tanh")
    assert block is not None
    assert not block.takes(*layers(72, 172))
