"""A module's parameters as the tensors of a checkpoint: the reverse of `weights/load.py`, by the same plan."""

from __future__ import annotations

import torch
from torch import nn

from siglane.nn.linear import ShardedModule
from siglane.nn.plan import Destination, WeightPlan
from siglane.weights.load import owner_of


def checkpoint_tensors(module: nn.Module, plan: WeightPlan) -> dict[str, torch.Tensor]:
    """Every parameter of `module` under the names and in the shapes of a checkpoint.

    ValueError when a parameter is a shard of one that is cut over ranks, or no tensor of the plan fills it.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        owner, leaf = owner_of(module, name)
        if isinstance(owner, ShardedModule) and owner.tp.size > 1:
            raise ValueError(
                f"{name} is a shard: rank {owner.tp.rank} of {owner.tp.size}; export a model that is whole"
            )
        stored = owner.stored_parts(leaf) if isinstance(owner, ShardedModule) else {"": parameter.detach()}
        if len(stored) > 1 and plan.source(Destination(name, next(iter(stored)))) is None:
            stored = {"+".join(stored): torch.cat(tuple(stored.values()))}
        for part, tensor in stored.items():
            source = plan.source(Destination(name, part))
            if source is None:
                raise ValueError(f"no tensor of a checkpoint fills {name}")
            tensors[source] = tensor
    return tensors
