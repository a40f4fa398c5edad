"""Encoder blocks of 8 bits: what stands between two products of integers is as few passes over memory as torch allows.

A norm writes codes itself, whose steps are a power of the root of two times a constant of the layer. Rows of one power
share a product, so its outputs are true values and oneDNN adds the bias and applies the GELU while they are in a
register; a row's power is its own, so no neighbour changes its numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from siglane.nn.act import activate
from siglane.nn.cpu.few_rows import LEAST, LEVELS, MIDDLE, WHOLE
from siglane.nn.cpu.int8 import Int8Linear, refuse_gradient
from siglane.nn.encoder import EncoderMLP

USUAL_PEAK = 5.0  # a row's greatest value over the norm's usual one: normal rows of 1,152 values have 2.6 to 5
CHUNK_ROWS = 192  # whose wide values a core's cache holds
GROUP_STEP = 64  # rows of a group are filled up to a multiple of it: oneDNN compiles a kernel for each number of rows
MOST = 2  # powers of the root of two, on either side of one, that a group's steps are off the usual ones
EVEN = 0.75  # of the codes around zero that a row uses at least


@dataclass(frozen=True, slots=True, eq=False)
class CodedRows:
    """Rows of a norm as codes around MIDDLE, u8 `[N, K]`.

    groups: (what one step is worth, which rows; None for all). others: rows in none of them, and their values
    float32 `[n, K]`: one huge value, or most of them on one side of zero, would leave them few codes, so they get steps
    and a zero of their own. A row may be named several times. dtype: of the rows behind the block's products.
    """

    codes: torch.Tensor
    groups: tuple[tuple[float, torch.Tensor | None], ...]
    others: tuple[torch.Tensor, torch.Tensor] | None
    dtype: torch.dtype

    def parts(self, rows: int) -> Iterator[tuple[torch.Tensor, float, torch.Tensor | slice]]:
        """codes, step and place of at most `rows` rows at a time."""
        for step, members in self.groups:
            for start in range(0, len(self.codes) if members is None else len(members), rows):
                place = slice(start, start + rows) if members is None else members[start : start + rows]
                yield self.codes[place], step, place


class CodedNorm(nn.LayerNorm):
    """LayerNorm whose result is `CodedRows`. Its shift is zero: `quantise` moves it into the layer behind."""

    def forward(self, x: torch.Tensor) -> CodedRows:  # type: ignore[override]
        """x `[N, K]`."""
        refuse_gradient(x)
        gain, rows = self.weight.float(), x.float()
        step = USUAL_PEAK / LEVELS * max(float(gain.square().mean().sqrt()), LEAST)
        whole = self._whole(rows, gain / step)
        codes, powers = _bytes(whole), _powers(whole)
        if bool((powers == 0).all()):
            return CodedRows(codes, ((step, None),), None, x.dtype)
        groups = []
        for power in range(-MOST, MOST + 1):
            members, worth = torch.nonzero(powers == power)[:, 0], step * 2.0 ** (power / 2)
            if len(members) > 0:
                codes[members] = _bytes(self._whole(rows[members], gain / worth))
                groups.append((worth, _filled(members)))
        others = torch.nonzero(powers.abs() > MOST)[:, 0]
        if len(others) == 0:
            return CodedRows(codes, tuple(groups), None, x.dtype)
        others = _filled(others)
        values = F.layer_norm(rows[others], self.normalized_shape, gain, self.bias.float(), self.eps)
        return CodedRows(codes, tuple(groups), (others, values), x.dtype)

    def _whole(self, rows: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        """Whole numbers around WHOLE + MIDDLE, f32."""
        return F.layer_norm(rows, self.normalized_shape, gain, torch.full_like(gain, WHOLE + MIDDLE), self.eps)


def _bytes(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.int32).to(torch.uint8)


def _powers(whole: torch.Tensor) -> torch.Tensor:
    """Of the root of two, i64 `[N]`: how much coarser a row's steps are to be, so that it has all codes and no more;
    beyond MOST for rows that lie unevenly about zero."""
    low, high = (WHOLE + MIDDLE) - whole.amin(-1), whole.amax(-1) - (WHOLE + MIDDLE)
    peaks = torch.maximum(low, high)
    powers = ((peaks.clamp_min(1) + 0.5) / LEVELS).log2().mul_(2).ceil_()
    powers[low + high < EVEN * 2 * peaks] = MOST + 1
    return powers.nan_to_num(MOST + 1).clamp(-MOST - 1, MOST + 1).long()


def _filled(members: torch.Tensor) -> torch.Tensor:
    missing = -len(members) % GROUP_STEP
    return torch.cat((members, members[-1:].expand(missing)))


@functools.cache
def attention_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of what attention reads behind codes, whose error is larger than bfloat16's, in a tower of `dtype`."""
    return torch.bfloat16 if dtype == torch.float32 and torch.cpu._is_avx512_bf16_supported() else dtype


def coded_product(linear: Int8Linear, rows: CodedRows, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`rows W^T + b`: `[N, outputs]` of `dtype`."""
    if len(rows.groups) == 1 and rows.groups[0][1] is None:
        return linear.product(rows.codes, MIDDLE, rows.groups[0][0], dtype=dtype)
    out = torch.empty(len(rows.codes), linear.outputs, dtype=dtype)
    for codes, step, place in rows.parts(len(out)):
        out[place] = linear.product(codes, MIDDLE, step, dtype=dtype)
    if rows.others is not None:
        place, values = rows.others
        out[place] = linear(values).to(dtype)
    return out


class CodedMLP(EncoderMLP):
    """Some rows at a time, so that their hidden values never leave the cache."""

    def forward(self, x: CodedRows) -> torch.Tensor:  # type: ignore[override]
        fc1, fc2 = self.fc1.linear, self.fc2.linear
        assert isinstance(fc1, Int8Linear)
        assert isinstance(fc2, Int8Linear)
        out = torch.empty(len(x.codes), fc2.outputs, dtype=x.dtype)
        for codes, step, place in x.parts(CHUNK_ROWS):
            out[place] = fc2.consume(fc1.product(codes, MIDDLE, step, self.activation)).to(x.dtype)
        if x.others is not None:
            place, values = x.others
            out[place] = fc2(activate(fc1(values), self.activation)).to(x.dtype)
        return out


def consume_centred(linear: Int8Linear, x: torch.Tensor) -> torch.Tensor:
    """x `[N, K]` of any float dtype, whose values lie alike on both sides of zero and which is written to -> float32
    `[N, outputs]`."""
    out = torch.empty(len(x), linear.outputs)
    for part, into in zip(x.split(CHUNK_ROWS), out.split(CHUNK_ROWS), strict=True):
        rows = part.float()
        peaks = torch.maximum(rows.amax(-1, keepdim=True), -rows.amin(-1, keepdim=True)).clamp_min_(LEAST)
        codes = _bytes(rows.mul_(LEVELS / peaks).add_(WHOLE + MIDDLE))
        into.copy_(linear.scaled(codes, MIDDLE, peaks / LEVELS))
    return out
