"""Products of 8-bit weights on CPUs: integers inside, float32 outside.

Weights are int8, symmetric, one scale for each output; each row becomes integers as it comes, with a scale of its own,
so that its result never depends on its neighbours; sums are 32-bit integers. That is W8A8 with per-channel and
per-token scales (arXiv:2208.07339 section 2, arXiv:2211.10438 section 2). How a row becomes integers is what the three
layers differ in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch

from siglane.nn.act import swiglu
from siglane.nn.cpu.codes import Codes, corrected, row_codes
from siglane.nn.cpu.few_rows import FEW, LEAST, LEVELS, MIDDLE, WIDE_LEVELS, offset, peak_of, scratch_of
from siglane.nn.cpu.int8_packing import pack_codes, sums, unpack_codes
from siglane.nn.cpu.jit.entrance import compiled_layer, compiles, native_layer
from siglane.nn.cpu.memory import in_large_pages
from siglane.nn.cpu.onednn import integer_product, is_exact
from siglane.nn.cpu.sealed import Sealed

if TYPE_CHECKING:
    from siglane.nn.cpu.jit.layer import CompiledLayer

WEIGHT_VALUES = 1 << 18  # that are rounded at a time
ROWS = 256  # of one product: what passes between its steps then stays in the cache


Turn = Callable[[torch.Tensor], torch.Tensor]


def refuse_gradient(x: torch.Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("an 8-bit layer has no gradient; use torch.no_grad(), or train the model in float32")


class Int8Codes(NamedTuple):
    """A weight `[N, K]`: codes int8 `[N, K]` times scale float32 `[N]`."""

    codes: torch.Tensor
    scale: torch.Tensor


def int8_codes(weight: torch.Tensor, turn: Turn | None = None) -> Int8Codes:
    """turn: what is done to rows of `weight` first, some at a time, so that no second copy of it exists."""
    made = Int8Codes(torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight)))
    count = max(1, WEIGHT_VALUES // weight.shape[1])
    for rows, into, scale in zip(*(x.split(count) for x in (weight.detach(), *made)), strict=True):
        wide = (rows if turn is None else turn(rows)).float()
        peak = wide.abs().amax(1)
        scale.copy_(torch.where(peak > LEAST, peak, 1.0) / LEVELS)
        into.copy_((wide / scale[:, None]).round_())
    return made


class Int8Weight(Sealed):
    """`y = x W^T + b` with int8 W: x `[..., K]` of any float dtype -> `[..., N]` in the same one.

    It lives on the CPU and has no parameters: it cannot be trained, saved, moved, cast, copied or loaded into;
    ValueError for any attempt. A row with an infinite or undefined value gives undefined values, and no other row does.
    """

    sealed, sealed_by, refusal = "an 8-bit layer", "quantise", ValueError

    def __init__(self, weight: torch.Tensor | Int8Codes, bias: torch.Tensor | None, turn: Turn | None = None) -> None:
        """turn: what is done to rows of `weight` first."""
        super().__init__()
        codes, self.scale = weight if isinstance(weight, Int8Codes) else int8_codes(weight, turn)
        self.outputs, self.inputs = codes.shape
        self.packed, self._ordered = pack_codes(codes)
        in_large_pages(self.packed)
        self.compiled: CompiledLayer | None = None  # in one call, where this machine can
        self.sums = sums(self.packed, self.outputs, self.inputs) * self.scale
        self.zero_points = torch.zeros(self.outputs, dtype=torch.int64)
        self.bias = None if bias is None else bias.detach().float()

    @property
    def stored(self) -> Int8Codes:
        """What it was made of; the codes are a copy."""
        return Int8Codes(unpack_codes(self.packed, self.outputs, self.inputs), self.scale)

    @property
    def nbytes(self) -> int:
        """What it holds in memory."""
        held = (self.scale, self.zero_points, self.sums, self.bias)
        return self.outputs * self.inputs + sum(x.nbytes for x in held if x is not None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        refuse_gradient(x)
        if x.ndim == 2 and x.dtype == torch.float32:  # a step of few rows has mostly calls to wait for
            return self._rows(x)
        return self._rows(x.reshape(-1, self.inputs).float()).to(x.dtype).reshape(*x.shape[:-1], self.outputs)

    def added(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """`residual + self(x)`"""
        if self.compiled is not None and self.compiled.takes(x, residual):
            refuse_gradient(x)
            return self.compiled(x, residual)
        return residual + self(x)

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """`swiglu(self(x))`: `[..., N / 2]`"""
        if self.compiled is not None and self.compiled.gates and self.compiled.takes(x):
            refuse_gradient(x)
            return self.compiled.gated(x)
        return swiglu(self(x))

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """float32 `[M, K]`"""
        count = x.shape[0]
        if self.compiled is not None and count <= self.compiled.most:
            return self.compiled(x)
        if self.compiled is not None and not self.packed.is_mkldnn:
            return torch.cat([self.compiled(part) for part in x.split(self.compiled.most)])
        if count <= ROWS:
            return self._multiply_few(x) if count <= FEW else self._multiply(x)
        y = torch.empty(count, self.outputs)
        for part, into in zip(x.split(ROWS), y.split(ROWS), strict=True):
            into.copy_(self._multiply(part))
        return y

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        """float32 `[M, K]` -> `[M, N]`."""
        raise NotImplementedError

    def _multiply_few(self, x: torch.Tensor) -> torch.Tensor:
        """The same for few rows, where each call counts more than what it computes."""
        return self._multiply(x)

    def _compile(self, rows: Literal["centred", "wide"], eps: float | None = None) -> None:
        if self._ordered and (kind := compiled_layer()) is not None:
            self.compiled = kind.eight(rows, self.packed, self.scale, self.bias, self.inputs, eps)

    def _product(
        self, codes: torch.Tensor, zero: int = 0, scale: float = 1.0, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`(codes - zero) * scale` times the weights, plus `bias`, float32: codes u8 `[M, K]` -> `[M, N]`."""
        return integer_product(codes, self.packed, self.scale, self.zero_points, zero, scale, bias)

    def _scaled(self, product: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return product.mul_(scale) if self.bias is None else torch.addcmul(self.bias, product, scale)


class Int8Linear(Int8Weight):
    """Rows of 8 bits with a zero point of their own. That is what outliers need: in a row with one huge value, or
    behind a GELU, almost everything else lies on one side of it."""

    def __init__(self, weight: torch.Tensor | Int8Codes, bias: torch.Tensor | None) -> None:
        super().__init__(weight, bias)
        shift = torch.zeros(self.outputs) if self.bias is None else self.bias
        # what a row's zero point adds to its sums, and the bias: one product with [zero point, 1] adds both
        self.corrections = torch.stack((self.sums, shift))
        made = native_layer() if self._ordered else None  # for a block's compiled loops, where this machine can
        self.native = None if made is None else made.eight(self.packed, self.scale, self.bias, self.inputs)
        kind = None if self.packed.is_mkldnn else compiled_layer()
        self._coded = None if kind is None else kind.coded(self.packed, self.scale, self.inputs)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        rows = row_codes(x)
        return corrected(self.sums_of(rows), rows, self.corrections)

    def sums_of(self, rows: Codes) -> torch.Tensor:
        """The product of codes, times the outputs' scales alone: float32 `[M, N]`, for `corrected`."""
        if self._coded is None:
            return self._product(rows.codes)
        return torch.cat([self._coded(part) for part in rows.codes.split(self._coded.most)])


class NormedInt8Linear(Int8Weight):
    """Rows of integers around zero, whose scale takes in a norm.

    eps: of an RMSNorm without gain that stands before the layer. It is a scale of the row and changes no code.
    """

    rows: Literal["centred", "wide"]

    def __init__(
        self,
        weight: torch.Tensor | Int8Codes,
        bias: torch.Tensor | None,
        turn: Turn | None = None,
        *,
        eps: float | None = None,
    ) -> None:
        super().__init__(weight, bias, turn)
        self.eps = eps
        self._compile(self.rows, eps)

    def _normed(self, scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`scale` `[M, 1]` of rows x, written to."""
        if self.eps is not None:
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            scale /= length.square_().div_(self.inputs).add_(self.eps).sqrt_()
        return scale

    def _normed_one(self, scale: float, x: torch.Tensor) -> float:
        """The same of one row `[1, K]`, in fewer calls."""
        if self.eps is None:
            return scale
        row = x.numpy()[0]
        return scale / math.sqrt(float(np.dot(row, row)) / self.inputs + self.eps)


class CentredInt8Linear(NormedInt8Linear):
    """Rows of 8 bits around zero: for rows without outliers, whose values lie alike on both sides."""

    rows = "centred"

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp_min_(LEAST)
        codes = _whole(x, scale.reciprocal(), MIDDLE, LEVELS).to(torch.uint8)
        return self._scaled(self._product(codes, MIDDLE, 1 / LEVELS), self._normed(scale, x))

    def _multiply_few(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 1:
            return self._multiply_one(x)
        scratch = scratch_of(x.shape)
        scale = scratch.peaks(x)
        codes = scratch.codes.copy_(scratch.whole(x, LEVELS / scale, MIDDLE))
        return self._scaled(self._product(codes, MIDDLE, 1 / LEVELS), self._normed(scale, x))

    def _multiply_one(self, x: torch.Tensor) -> torch.Tensor:
        scratch, peak = scratch_of(x.shape), peak_of(x)
        codes = scratch.codes.copy_(scratch.whole_of_one(x, LEVELS / peak, MIDDLE))
        return self._product(codes, MIDDLE, self._normed_one(peak / LEVELS, x), self.bias)


class WideInt8Linear(NormedInt8Linear):
    """Rows of 16 bits, as two products, of their high and their low bytes: few rows cost as much as one, because the
    weights are read once, and what remains of the error is the weights'."""

    rows = "wide"

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp_min_(LEAST)
        codes = _whole(x, scale.reciprocal(), MIDDLE * 256 + MIDDLE, WIDE_LEVELS)
        product = self._product(torch.cat((codes >> 8, codes)).to(torch.uint8), MIDDLE, 1 / WIDE_LEVELS)
        high, low = product.chunk(2)
        return self._scaled(low.add_(high, alpha=256), self._normed(scale, x))

    def _multiply_few(self, x: torch.Tensor) -> torch.Tensor:
        scratch = scratch_of(x.shape)
        if len(x) == 1:
            peak = peak_of(x)
            whole = scratch.whole_of_one(x, WIDE_LEVELS / peak, MIDDLE * 256 + MIDDLE)
            scale = self._normed_one(peak / WIDE_LEVELS, x)
            high, low = self._product(scratch.bytes(whole), MIDDLE, scale).chunk(2)
            y = low.add_(high, alpha=256)
            return y if self.bias is None else y.add_(self.bias)
        peaks = scratch.peaks(x)
        whole = scratch.whole(x, WIDE_LEVELS / peaks, MIDDLE * 256 + MIDDLE)
        high, low = self._product(scratch.bytes(whole), MIDDLE, 1 / WIDE_LEVELS).chunk(2)
        return self._scaled(low.add_(high, alpha=256), self._normed(peaks, x))


def _whole(x: torch.Tensor, steps: torch.Tensor, zero: int, levels: int) -> torch.Tensor:
    """`x * steps * levels + zero`, rounded, between 0 and 2^16: i32 whose low bytes are the code."""
    return torch.addcmul(offset(zero), x, steps, value=levels).view(torch.int32)


def has_integer_products() -> bool:
    """Whether int8 products are integer products here, oneDNN's or compiled ones."""
    return is_exact() or compiles()
