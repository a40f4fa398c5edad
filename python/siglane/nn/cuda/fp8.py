"""Linear layers whose products are those of 8-bit floats in hardware: torch's `_scaled_mm` with a scale for each row.

Torch has it from compute capability 8.9 on (aten/src/ATen/native/cuda/RowwiseScaledMM.cu). It takes rows whose scales
are `[M, 1]` and weights that lie output by output, seen as `[K, N]`, with scales `[1, N]`, both float32; K and N are
multiples of 16; bias and result are bfloat16.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from siglane.errors import EngineError
from siglane.nn.cuda.ops import OPS
from siglane.nn.trial import first_right

logger = logging.getLogger(__name__)

CAPABILITY = 8, 9  # the least
MULTIPLE = 16
LARGEST, LEAST = 448.0, 1e-12  # as of `fp8_rows.py`, which cannot be imported without Triton
TRIAL = 40, 200, 90  # rows, inputs, outputs: no multiples
ROWS = 4096  # of a layer's own trial, about six images of 27 x 27 patches
# ||found - exact|| / ||exact||: rounding both sides to three bits behind the first one makes 0.037
FURTHEST = 0.05
REPEATS, ROUNDS = 10, 3

Rows = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
Clock = Callable[[Callable[[], object], torch.device], float]


def rows_in_torch(x: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x `[M, K]` -> codes float8_e4m3fn `[M, width]`, zeros behind the K-th, scales float32 `[M, 1]`."""
    wide = x.float()
    scales = wide.abs().amax(1, keepdim=True).clamp_min(LEAST) / LARGEST
    return F.pad(wide / scales, (0, width - x.shape[1])).to(torch.float8_e4m3fn), scales


class Fp8Linear(nn.Module):
    """`x W^T + b`, both sides rounded to 8-bit floats. weight: float, on the device."""

    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(self, rows: Rows, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._rows, (self.outputs, inputs) = rows, weight.shape
        spare = -self.outputs % MULTIPLE
        with torch.no_grad():
            codes, scales = rows_in_torch(F.pad(weight, (0, 0, 0, spare)), inputs + -inputs % MULTIPLE)
            self.bias = None if bias is None else nn.Parameter(F.pad(bias.bfloat16(), (0, spare)), requires_grad=False)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales.view(1, -1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes, scales = self._rows(x.flatten(0, -2), self.codes.shape[1])
        product = torch._scaled_mm(
            codes, self.codes.t(), scales, self.scales, self.bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return product[:, : self.outputs].to(x.dtype).unflatten(0, x.shape[:-1])


class FloatLinear(nn.Module):
    """`x W^T + b` as it is, where 8-bit floats are no faster."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class Fp8Layers:
    """Makes a layer of a weight and a bias: the first of each shape is tried on `ROWS` random rows, and all of that
    shape stay in floats where 8-bit ones are further off than rounding explains, or no faster."""

    def __init__(self, rows: Rows, clock: Clock) -> None:
        self._rows, self._clock = rows, clock
        self._taken: dict[torch.Size, bool] = {}

    def __call__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
        if weight.shape not in self._taken:
            self._taken[weight.shape] = self._is_better(weight)
        return Fp8Linear(self._rows, weight, bias) if self._taken[weight.shape] else FloatLinear(weight, bias)

    @torch.no_grad()
    def _is_better(self, weight: torch.Tensor) -> bool:
        coded, plain = Fp8Linear(self._rows, weight, None), FloatLinear(weight, None)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(ROWS, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
        exact = F.linear(x.float(), weight.float())
        off = float((coded(x).float() - exact).norm() / exact.norm())
        share = self._clock(lambda: coded(x), weight.device) / self._clock(lambda: plain(x), weight.device)
        taken = off <= FURTHEST and share < 1
        logger.log(
            logging.INFO if taken else logging.WARNING,
            "fp8 products with weights of %s are %.3f off and take %.2f times as long as those in %s: %s",
            *(list(weight.shape), off, share, weight.dtype, "used" if taken else "not used here"),
        )
        return taken


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """The least of some rounds, each of several calls behind one another."""
    run()
    found = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(REPEATS):
            run()
        torch.cuda.synchronize(device)
        found.append(time.perf_counter() - begin)
    return min(found)


def fp8_layers(device: torch.device, clock: Clock = seconds) -> Fp8Layers:
    """What makes such layers, by the quickest way to code rows that is right there. EngineError where none is."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        raise EngineError(f"a GPU of compute capability {'.'.join(map(str, CAPABILITY))} or newer multiplies them")
    rows, inputs, outputs = TRIAL
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, inputs), (outputs, inputs), (outputs,)
    x, weight, bias = (torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in shapes)
    weight = weight * inputs**-0.5
    (codes, scales), (others, shares) = rows_in_torch(x, inputs), rows_in_torch(weight, inputs)
    exact = F.linear(codes.float() * scales, others.float() * shares, bias.float())
    candidates: dict[str, Rows] = {"Triton": OPS.fp8_rows, "torch": rows_in_torch}
    run = partial(_product_of, x, weight, bias)
    return Fp8Layers(first_right("rows of fp8 products", candidates, run, exact)[1], clock)


def _product_of(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, rows: Rows) -> torch.Tensor:
    product: torch.Tensor = Fp8Linear(rows, weight, bias)(x)
    return product
