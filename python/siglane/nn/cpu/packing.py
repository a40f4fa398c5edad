"""Weights in the order in which a CPU's product reads them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from siglane.nn.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear

ROWS = 512  # of the products that oneDNN lays the weights out for; other sizes take the same layout


def prepack(model: nn.Module) -> None:
    """Lays the float32 weights of `model`'s linear layers out anew, on CPUs; elsewhere nothing happens.

    Without it oneDNN does so within every product, which takes half of the rate of those of few rows
    (`python benchmark/machine.py`). The sums stay the same, but for their order where there is a single row. For
    inference only: a packed weight is no parameter any more, it cannot be trained, saved, moved, cast or loaded into.
    Weights that layers share stay as they are, because an embedding reads them row by row.
    """
    if not torch.backends.mkldnn.is_available():
        return
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for layer in model.modules():
        if not isinstance(layer, ColumnParallelLinear | RowParallelLinear | QKVParallelLinear):
            continue
        weight = layer.weight
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and owners[id(weight)] == 1:
            packed: Any = packed_weight(weight.detach())
            del layer.weight
            layer.weight = packed  # a plain attribute from now on


def packed_weight(weight: torch.Tensor) -> torch.Tensor:
    """weight: float32 `[N, K]` on a CPU with oneDNN -> the same in the layout that `linear` of product.py takes."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    return packed
