"""Weights in the order in which a CPU's product reads them."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from siglane.nn.cpu.memory import in_large_pages
from siglane.nn.cpu.sealed import Sealed
from siglane.nn.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear, ShardedModule

ROWS = 512  # of the products that oneDNN lays the weights out for; other sizes take the same layout


def pack(model: nn.Module) -> None:
    """Lays the float32 weights of `model`'s linear layers out anew.

    Without it oneDNN does so within every product, which takes half of the rate of those of few rows
    (`python benchmark/machine.py`). Weights that layers share stay as they are, because an embedding reads them row by
    row.
    """
    if not torch.backends.mkldnn.is_available():
        return
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for layer in model.modules():
        packed = PACKED.get(type(layer))
        if packed is None:
            continue
        weight = layer.get_parameter("weight")
        if weight.dtype == torch.float32 and owners[id(weight)] == 1:
            layer.weight = nn.Parameter(packed_weight(weight.detach()), requires_grad=False)
            layer.__class__ = packed


def packed_weight(weight: torch.Tensor) -> torch.Tensor:
    """weight: float32 `[N, K]` on a CPU with oneDNN -> the same in the layout that `linear` of product.py takes."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    in_large_pages(packed)
    return packed


class Packed(Sealed, ShardedModule):
    """A linear layer with a packed weight, which is still among the parameters, frozen."""

    sealed, sealed_by = "a packed layer", "optimise"

    def load_part(self, name: str, part: str, tensor: torch.Tensor) -> None:
        self.refuse("loaded into")


class PackedColumn(Packed, ColumnParallelLinear):
    pass


class PackedRow(Packed, RowParallelLinear):
    pass


class PackedQKV(Packed, QKVParallelLinear):
    pass


PACKED: dict[type[nn.Module], type[Packed]] = {
    ColumnParallelLinear: PackedColumn,
    RowParallelLinear: PackedRow,
    QKVParallelLinear: PackedQKV,
}
