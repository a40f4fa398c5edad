"""Products of 8-bit floats on the card against the same codes multiplied in float32."""

from __future__ import annotations

import pytest
import torch

from siglane.nn.cuda.fp8 import CAPABILITY, Fp8Linear, fp8_layers, rows_in_torch
from siglane.nn.cuda.ops import OPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; this machine has none"),
]

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("rows", [OPS.fp8_rows, rows_in_torch])
@pytest.mark.parametrize(
    ("count", "inputs", "outputs"), [(1, 64, 64), (17, 200, 90), (729, 1152, 4304), (4096, 4304, 1152)]
)
def test_a_product_is_that_of_its_codes(count: int, inputs: int, outputs: int, rows: object) -> None:
    """Rows and outputs of many sizes."""
    if torch.cuda.get_device_capability(CUDA) < CAPABILITY:
        pytest.skip("this GPU has no products of 8-bit floats")
    generator = torch.Generator().manual_seed(0)
    shapes = (count, inputs), (outputs, inputs), (outputs,)
    x, weight, bias = (torch.randn(shape, generator=generator).to(CUDA, torch.bfloat16) for shape in shapes)
    x, weight = x * torch.logspace(-2, 0, count, device=CUDA)[:, None].bfloat16(), weight * inputs**-0.5
    (codes, scales), (others, shares) = rows_in_torch(x, inputs), rows_in_torch(weight, inputs)
    expected = (codes.float() * scales) @ (others.float() * shares).T + bias.float()
    found = Fp8Linear(rows, weight, bias)(x)  # type: ignore[arg-type]
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=1e-2)


def test_rows_are_coded_by_the_kernel(caplog: pytest.LogCaptureFixture) -> None:
    if torch.cuda.get_device_capability(CUDA) < CAPABILITY:
        pytest.skip("this GPU has no products of 8-bit floats")
    with caplog.at_level("INFO", "siglane"):
        fp8_layers(CUDA)
    assert "rows of fp8 products: Triton" in caplog.text
