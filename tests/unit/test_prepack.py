"""Packed weights: the same products, and what must be left alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from siglane.nn.cpu.optimise import optimise
from siglane.nn.embedding import VocabParallelEmbedding
from siglane.nn.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from siglane.nn.parallel import TensorParallel

ONE = TensorParallel.single()


class Layers(nn.Module):
    """One linear layer of each kind, with random weights."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.column = ColumnParallelLinear(48, {"gate": 33, "up": 33}, bias=bias, tp=ONE)
        self.row = RowParallelLinear(48, 20, bias=bias, tp=ONE)
        self.qkv = QKVParallelLinear(48, 4, 2, 9, bias=bias, tp=ONE)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = [part.flatten(-2) for part in self.qkv(x)]
        return torch.cat([self.column(x, "gelu_tanh"), self.row(x), *heads], -1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 2, 15, 16, 17, 512, 1500])
def test_the_products_are_the_same(rows: int, bias: bool) -> None:
    plain = Layers(bias)
    packed = copy.deepcopy(plain)
    optimise(packed)
    x = torch.randn(rows, 48, generator=torch.Generator().manual_seed(rows))
    torch.testing.assert_close(packed(x), plain(x), atol=1e-5, rtol=1e-5)


def test_packed_weights_are_still_parameters() -> None:
    layers = Layers()
    sizes = {name: (parameter.shape, parameter.dtype) for name, parameter in layers.named_parameters()}
    optimise(layers)
    assert {name: (parameter.shape, parameter.dtype) for name, parameter in layers.named_parameters()} == sizes
    assert layers.column.weight.is_mkldnn
    assert not layers.column.weight.requires_grad
    optimise(layers)  # nothing is left to do


REFUSED: dict[str, Callable[[nn.Module], object]] = {
    "saved": lambda model: model.state_dict(),
    "loaded into": lambda model: model.load_state_dict(Layers().state_dict()),
    "loaded into, not strictly": lambda model: model.load_state_dict({}, strict=False),
    "a part of it loaded into": lambda model: model.row.load_part("weight", "", torch.zeros(20, 48)),
    "cast": lambda model: model.to(torch.bfloat16),
    "cast to double": lambda model: model.double(),
    "moved": lambda model: model.to("meta"),
    "copied": copy.deepcopy,
    "pickled": pickle.dumps,
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_lose_packed_weights_is_refused(what: str) -> None:
    """Each of these went on without the weights, or with the old ones, or failed with a riddle."""
    model = Layers()
    optimise(model)
    before = model(torch.ones(2, 48))
    words = what.split(",")[0].removeprefix("a part of it ").split(" to ")[0]
    with pytest.raises(RuntimeError, match=rf"a packed layer cannot be .*{words}.*; load the model again"):
        REFUSED[what](model)
    assert torch.equal(model(torch.ones(2, 48)), before)


def test_what_changes_nothing_is_allowed() -> None:
    model = Layers()
    optimise(model)
    before = model(torch.ones(2, 48))
    same = model.eval().to("cpu").to(torch.float32).float().cpu().requires_grad_(False)
    assert same is model
    assert torch.equal(same(torch.ones(2, 48)), before)


def test_a_packed_weight_is_not_trained_but_lets_gradients_through() -> None:
    plain = Layers().requires_grad_(False)
    packed = copy.deepcopy(plain)
    optimise(packed)
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    gradients = []
    for model in (plain, packed):
        own = x.clone().requires_grad_()
        model.row(own).square().sum().backward()
        gradients.append(own.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
    packed.requires_grad_(True)
    with pytest.raises(RuntimeError, match="a packed weight cannot be trained"):
        packed.row(x)


def test_autocast_decides_the_dtype_of_packed_products_too() -> None:
    plain = Layers()
    packed = copy.deepcopy(plain)
    optimise(packed)
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = packed(x)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, plain(x))


def test_a_weight_that_an_embedding_reads_stays_as_it_is() -> None:
    layers = Layers(bias=False)
    layers.words = VocabParallelEmbedding(20, 48, ONE)
    layers.words.weight = layers.row.weight
    optimise(layers)
    assert not layers.row.weight.is_mkldnn
    assert layers.column.weight.is_mkldnn
    torch.testing.assert_close(layers.words(torch.tensor([3])), layers.row.weight[3:4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_stay_as_they_are(dtype: torch.dtype) -> None:
    layers = Layers().to(dtype)
    optimise(layers)
    assert not any(module.weight.is_mkldnn for module in (layers.column, layers.row, layers.qkv))
    assert layers(torch.ones(2, 48, dtype=dtype)).dtype == dtype
