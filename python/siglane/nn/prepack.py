"""Weights in the order in which a CPU's product reads them."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from siglane.nn.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear

ROWS = 512  # of the products that oneDNN lays the weights out for; other sizes take the same layout


def prepack(model: nn.Module) -> None:
    """Lays the float32 weights of `model`'s linear layers out anew, on CPUs; elsewhere nothing happens.

    Without it oneDNN does so within every product, which costs a batch of 2 to 16 rows more than the product itself
    (`python benchmark/machine.py`). The sums stay the same. For inference only: a packed weight is no parameter any
    more, it cannot be trained, saved, moved, cast or loaded into. Weights that layers share stay as they are, because
    an embedding reads them row by row.
    """
    if not torch.backends.mkldnn.is_available():
        return
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for layer in model.modules():
        if not isinstance(layer, ColumnParallelLinear | RowParallelLinear | QKVParallelLinear):
            continue
        weight = layer.weight
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and owners[id(weight)] == 1:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
            del layer.weight
            layer.weight = packed
