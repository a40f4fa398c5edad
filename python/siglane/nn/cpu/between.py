"""What rows of an 8-bit encoder block pass through between two of its products."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from siglane.nn.act import activate
from siglane.nn.cpu.codes import Codes, corrected, row_codes
from siglane.types import Activation


class Between:
    """By torch; `jit/between_calls.py` has the same in one pass each.

    Tensors are float32 where nothing else is said. sums: what `sums_of` of a layer made of `rows`; corrections: the
    layer's.
    """

    def normed(self, x: torch.Tensor, gain: torch.Tensor, eps: float) -> Codes:
        """LayerNorm, without shift, of x `[N, K]`."""
        rows = F.layer_norm(x, gain.shape, gain, None, eps)
        return row_codes(rows, scratch=rows)

    def coded(self, x: torch.Tensor) -> Codes:
        """x float32 or bfloat16 `[N, K]`"""
        return row_codes(x.float())

    def finished(self, sums: torch.Tensor, rows: Codes, corrections: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """A layer's results, written into y float32 or bfloat16 `[N, outputs]`. Writes to `sums`."""
        return y.copy_(corrected(sums, rows, corrections))

    def added(
        self, sums: torch.Tensor, rows: Codes, corrections: torch.Tensor, residual: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        """The same, plus `residual`, which may be `y`."""
        return torch.add(residual, corrected(sums, rows, corrections), out=y)

    def activated(self, sums: torch.Tensor, rows: Codes, corrections: torch.Tensor, activation: Activation) -> Codes:
        """Codes of the activation of a layer's results. Writes to `sums`."""
        values = activate(corrected(sums, rows, corrections), activation)
        return row_codes(values, scratch=values)
