"""One product, two kernels: float32 without gradients may take another one than torch's default."""

from __future__ import annotations

import pytest
import torch

from siglane.nn.cpu.packing import packed_weight
from siglane.nn.cpu.product import linear, uses_onednn
from siglane.types import Activation


@pytest.mark.parametrize("rows", [0, 1, 7, 576])
@pytest.mark.parametrize("bias", [True, False])
def test_without_gradients_it_is_a_float32_product(rows: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, 768, generator=generator), torch.randn(96, 768, generator=generator)
    added = torch.randn(96, generator=generator) if bias else None
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if added is None else added.double())
    with torch.no_grad():
        product = linear(x, weight, added)
    assert product.dtype == torch.float32
    torch.testing.assert_close(product.double(), exact, rtol=0, atol=5e-4)  # bfloat16 sums would be wrong by 0.1


def test_leading_dimensions_are_kept() -> None:
    with torch.no_grad():
        assert linear(torch.randn(2, 3, 8), torch.randn(5, 8)).shape == (2, 3, 5)


def test_gradients_flow_when_they_are_wanted() -> None:
    x, weight = torch.randn(3, 8), torch.randn(5, 8, requires_grad=True)
    linear(x, weight).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, x.sum(0).expand(5, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half(dtype: torch.dtype) -> None:
    with torch.no_grad():
        assert linear(torch.ones(2, 8, dtype=dtype), torch.ones(4, 8, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
@pytest.mark.parametrize("bias", [True, False])
def test_autocast_decides_the_dtype(bias: bool, activation: Activation | None) -> None:
    """oneDNN's own product knows nothing of it and would give float32."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(7, 96, generator=generator), torch.randn(33, 96, generator=generator)
    added = torch.randn(33, generator=generator) if bias else None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert not uses_onednn(x, weight, added)
        expected = torch.nn.functional.linear(x, weight, added)
        if activation is not None:
            expected = torch.nn.functional.gelu(expected, approximate="tanh")
        found = linear(x, weight, added, activation)
        assert found.dtype == expected.dtype == torch.bfloat16
        assert torch.equal(found, expected)
        with torch.autocast("cpu", enabled=False):
            assert linear(x, weight, added).dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
def test_inputs_that_lie_in_any_order(packed: bool) -> None:
    """Columns, every other row, expanded rows, undefined values, no leading dimension: the numbers of torch's own."""
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    x[3, 2] = torch.nan
    given = packed_weight(weight) if packed else weight
    for one in (x[:8].T, x.T[:, ::2], x.T[:, 8:], x[:8, :1].T.expand(4, 8), x[:8, 0], x[:8].T[:0], x.view(2, 6, 8)):
        expected = torch.nn.functional.linear(one, weight)
        torch.testing.assert_close(linear(one, given), expected, equal_nan=True)
