"""Rows as codes of 8 bits, each with a scale and a zero point of its own."""

from __future__ import annotations

from typing import NamedTuple

import torch

from siglane.nn.cpu.few_rows import LEAST, WHOLE

STEPS = 254  # of a row between its least and its greatest value; one code is left for rounding


class Codes(NamedTuple):
    """Rows that are about `codes * scale + shift`: codes u8 `[M, K]`, scale and shift together float32 `[M, 2]`. shift
    is -scale times the row's zero point."""

    codes: torch.Tensor
    marks: torch.Tensor

    @property
    def scale(self) -> torch.Tensor:
        """`[M, 1]`"""
        return self.marks[:, :1]

    @property
    def shift(self) -> torch.Tensor:
        """`[M, 1]`"""
        return self.marks[:, 1:]


def row_codes(x: torch.Tensor, scratch: torch.Tensor | None = None) -> Codes:
    """Of x float32 `[M, K]`. scratch is written to: of x's shape, or x itself.

    Zero has a code of its own, so that what is exactly zero stays so.
    """
    low, high = x.amin(-1, keepdim=True).clamp_max_(0), x.amax(-1, keepdim=True).clamp_min_(0)
    span = (high - low).clamp_min_(LEAST)
    steps, scale = STEPS / span, span / STEPS
    zero = (low * -steps).round_()
    # the 2^8 keeps what is just below zero above 2^23
    codes = torch.mul(x, steps, out=scratch).add_(zero + (WHOLE + 256)).view(torch.int32).to(torch.uint8)
    return Codes(codes, torch.cat((scale, zero * -scale), 1))


def corrected(sums: torch.Tensor, rows: Codes, corrections: torch.Tensor) -> torch.Tensor:
    """What a layer makes of `rows`, by its product `sums` of their codes `[M, N]`, which is written to. corrections
    `[2, N]`: the layer's sums of weights, and its bias."""
    sums.mul_(rows.scale)
    return sums.addmm_(torch.cat((rows.shift, torch.ones_like(rows.shift)), 1), corrections)
