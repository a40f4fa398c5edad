"""Packed weights: the same products, and what must be left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from siglane.nn.cpu.packing import prepack
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
    prepack(packed)
    x = torch.randn(rows, 48, generator=torch.Generator().manual_seed(rows))
    torch.testing.assert_close(packed(x), plain(x), atol=1e-5, rtol=1e-5)


def test_packed_weights_are_no_parameters() -> None:
    layers = Layers()
    prepack(layers)
    assert {name for name, _ in layers.named_parameters()} == {"column.bias", "row.bias", "qkv.bias"}
    assert layers.column.weight.is_mkldnn
    prepack(layers)  # nothing is left to do


def test_a_weight_that_an_embedding_reads_stays_as_it_is() -> None:
    layers = Layers(bias=False)
    layers.words = VocabParallelEmbedding(20, 48, ONE)
    layers.words.weight = layers.row.weight
    prepack(layers)
    assert not layers.row.weight.is_mkldnn
    assert layers.column.weight.is_mkldnn
    torch.testing.assert_close(layers.words(torch.tensor([3])), layers.row.weight[3:4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_stay_as_they_are(dtype: torch.dtype) -> None:
    layers = Layers().to(dtype)
    prepack(layers)
    assert not any(module.weight.is_mkldnn for module in (layers.column, layers.row, layers.qkv))
    assert layers(torch.ones(2, 48, dtype=dtype)).dtype == dtype
