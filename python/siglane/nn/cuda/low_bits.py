"""Linear layers whose weights are kept in 8 or 4 bits on a GPU; products are those of the rows' own dtype."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from siglane.nn.cuda.ops import OPS
from siglane.nn.trial import first_right

GROUP = 64  # as of `coded_product.py`, which cannot be imported without Triton
LEAST = 1e-12  # of a scale: rows of zeros have one, too
TRIAL = 40, 200, 96  # rows, inputs, outputs: no multiples of the kernel's blocks

# (x `[M, K]`, codes, scales, lows, bias) as of `coded_product` -> `[M, N]`
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]


class LowBitLinear(nn.Module):
    """`x W^T + b` of codes: eight bits with a scale for each output, four with a scale and a least value for each
    `GROUP` neighbours. weight: float, on the device; rounding is all that is lost."""

    codes: torch.Tensor
    scales: torch.Tensor
    lows: torch.Tensor | None

    def __init__(self, bits: int, product: Product, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._product, self.outputs = product, weight.shape[0]
        codes, scales, lows = eight_bits(weight) if bits == 8 else four_bits(weight)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("lows", lows)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        return self._product(rows, self.codes, self.scales, self.lows, self.bias).view(*x.shape[:-1], self.outputs)


@torch.no_grad()
def eight_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    """weight `[N, K]` -> codes i8 of the same shape, scales float32 `[N]`."""
    wide = weight.float()
    scales = wide.abs().amax(1).clamp_min(LEAST) / 127
    return (wide / scales[:, None]).round().to(torch.int8), scales, None


@torch.no_grad()
def four_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """weight `[N, K]` -> codes u8 `[N, groups * GROUP / 2]`, scales and lows `[N, groups]` in its dtype, in which they
    are rounded before codes are."""
    outputs, inputs = weight.shape
    wide = F.pad(weight.float(), (0, -inputs % GROUP)).view(outputs, -1, GROUP)
    lows = wide.amin(-1).to(weight.dtype)
    scales = ((wide.amax(-1) - lows.float()).clamp_min(LEAST) / 15).to(weight.dtype)
    codes = ((wide - lows.float()[..., None]) / scales.float().clamp_min(LEAST)[..., None]).round().clamp(0, 15)
    first, second = codes.to(torch.uint8).chunk(2, -1)
    return (first | second << 4).flatten(1), scales, lows


def product_in_torch(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, lows: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """The weight is made whole for each product."""
    if lows is None:
        weight = codes.float() * scales[:, None]
    else:
        pairs = codes.unflatten(1, (-1, GROUP // 2))
        whole = torch.cat((pairs & 15, pairs >> 4), -1).float()
        weight = (whole * scales.float()[..., None] + lows.float()[..., None]).flatten(1)[:, : x.shape[1]]
    return F.linear(x, weight.to(x.dtype), bias)


def low_bit_linear(bits: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> partial[LowBitLinear]:
    """What makes such layers, by the quickest product whose numbers are right there. The trial is of `dtype`."""
    rows, inputs, outputs = TRIAL
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, inputs), (outputs, inputs), (outputs,)
    x, weight, bias = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    weight = weight * inputs**-0.5
    expected = LowBitLinear(bits, product_in_torch, weight, bias)
    exact = product_in_torch(x.float(), expected.codes, expected.scales, expected.lows, bias.float())

    def run(product: Product) -> torch.Tensor:
        return LowBitLinear(bits, product, weight, bias)(x)

    candidates: dict[str, Product] = {"Triton": OPS.coded_product, "torch": product_in_torch}
    return partial(LowBitLinear, bits, first_right(f"products with weights of {bits} bits", candidates, run, exact)[1])
