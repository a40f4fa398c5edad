"""Rows of an 8-bit weight, read where its product keeps them: a tied table then lies in memory once."""

from __future__ import annotations

import ctypes

import torch

from siglane.nn.cpu.int8 import Int8Weight

# outputs and inputs of a block, as oneDNN lays weights out for processors with VNNI: four inputs of one output lie
# together, then the same four of the next output
OUTPUTS, INPUTS, TOGETHER = 64, 64, 4
CHECKED = 1024  # rows that are compared at a time


class PackedRows:
    """`rows[ids]` are the `codes` that `layer` was made of, int8 `[T, K]`.

    Where oneDNN keeps them in another order than the one known here, which comparing every row finds out, they are held
    a second time.
    """

    def __init__(self, layer: Int8Weight, codes: torch.Tensor) -> None:
        self._layer = layer  # whose memory is read
        self._blocks = _blocks(layer.packed, layer.outputs, layer.inputs)
        self._copy: torch.Tensor | None = None
        if not all(torch.equal(self[ids], codes[ids]) for ids in torch.arange(layer.outputs).split(CHECKED)):
            self._copy = codes

    def __getitem__(self, ids: torch.Tensor) -> torch.Tensor:
        if self._copy is not None:
            return self._copy[ids]
        return self._blocks[ids // OUTPUTS, :, ids % OUTPUTS].flatten(1)[:, : self._layer.inputs]

    @property
    def nbytes(self) -> int:
        """What it holds in memory beside the layer."""
        return 0 if self._copy is None else self._copy.nbytes


def _blocks(packed: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """The bytes of `packed` as `[outputs / OUTPUTS, inputs / TOGETHER, OUTPUTS, TOGETHER]`, zeros where they are too
    few. It is a view and does not keep them."""
    blocks, inside = -(-outputs // OUTPUTS), -(-inputs // INPUTS) * INPUTS
    shape = (blocks, inside // TOGETHER, OUTPUTS, TOGETHER)
    if torch.ops.mkldnn._nbytes(packed) < blocks * OUTPUTS * inside:
        return torch.zeros(1, dtype=torch.int8).expand(shape)
    memory = (ctypes.c_char * (blocks * OUTPUTS * inside)).from_address(torch.ops.mkldnn.data_ptr(packed))
    return torch.frombuffer(memory, dtype=torch.int8).view(shape)
