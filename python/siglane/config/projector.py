"""The facts of a projector: how patch features become rows of the language model's width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from siglane.types import Activation, Grid

Merge = Literal["none", "blocks", "pixel_shuffle", "average"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectorConfig:
    """One projector: merge neighbouring patches, then a stack of linear layers.

    merge: "none" keeps every patch; "blocks" concatenates `factor` x `factor` patches in channel order
    (row, column, channel), zero-padding odd grids at the bottom and right; "pixel_shuffle" is the same but refuses
    odd grids (nanoVLM); "average" pools adaptively to `target`.
    column_major: output rows run down the columns (VILA checkpoints from before December 2024, formats.md 5.3).
    layers: see `projector/mlp.py`; widths in the order of the forward pass.
    """

    merge: Merge
    factor: int
    target: Grid | None
    column_major: bool
    layers: tuple[Layer, ...]
    input_size: int
    output_size: int


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """`name` is the tensor prefix in the checkpoint (`layers.2`)."""

    name: str
    input_size: int
    output_size: int
    bias: bool


@dataclass(frozen=True, slots=True)
class NormLayer:
    name: str
    size: int
    eps: float


@dataclass(frozen=True, slots=True)
class ActivationLayer:
    activation: Activation


Layer = LinearLayer | NormLayer | ActivationLayer
