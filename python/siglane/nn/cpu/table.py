"""Rows of an 8-bit weight, read where its product keeps them: a tied table then lies in memory once."""

from __future__ import annotations

import torch

from siglane.nn.cpu.int8 import Int8Weight
from siglane.nn.cpu.int8_packing import OUTPUTS, blocks, holds


class PackedRows:
    """`rows[ids]` are the `codes` that `layer` was made of, int8 `[T, K]`.

    Where oneDNN keeps them in another order than the one known here, which comparing every row finds out, they are held
    a second time.
    """

    def __init__(self, layer: Int8Weight, codes: torch.Tensor) -> None:
        self._layer = layer  # whose memory is read
        self._copy = None if holds(layer.packed, codes) else codes.clone()  # which may be a view of a file
        if self._copy is None:
            self._blocks = blocks(layer.packed, layer.outputs, layer.inputs)

    def __getitem__(self, ids: torch.Tensor) -> torch.Tensor:
        if self._copy is not None:
            return self._copy[ids]
        return self._blocks[ids // OUTPUTS, :, ids % OUTPUTS].flatten(1)[:, : self._layer.inputs]

    @property
    def nbytes(self) -> int:
        """What it holds in memory beside the layer."""
        return 0 if self._copy is None else self._copy.nbytes
