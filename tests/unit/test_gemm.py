"""One product, two kernels: float32 without gradients may take another one than torch's default."""

from __future__ import annotations

import pytest
import torch

from siglane.nn.cpu.product import linear


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
