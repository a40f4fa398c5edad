"""Tensor parallelism as a value: who I am in the group and how to talk to the others. Explicit, never a global."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

Collective = Callable[[torch.Tensor], torch.Tensor]


def _identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """One rank's view of its group.

    all_reduce: the sum over ranks; all_gather: concatenation over ranks along the last dimension. Both may return
    their argument when size is 1. A host such as SGLang passes its own functions.
    """

    rank: int
    size: int
    all_reduce: Collective
    all_gather: Collective

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is outside a group of {self.size}")

    @classmethod
    def single(cls) -> TensorParallel:
        return cls(0, 1, _identity, _identity)

    @classmethod
    def from_group(cls, group: dist.ProcessGroup | None = None) -> TensorParallel:
        """The ranks of an initialised `torch.distributed` group (gloo or NCCL); None is the world."""
        size = dist.get_world_size(group)

        def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
            dist.all_reduce(tensor, group=group)
            return tensor

        def all_gather(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.contiguous()
            parts = [torch.empty_like(tensor) for _ in range(size)]
            dist.all_gather(parts, tensor, group=group)
            return torch.cat(parts, dim=-1)

        return cls(dist.get_rank(group), size, all_reduce, all_gather)

    def divides(self, *counts: int) -> TensorParallel:
        """Itself when every count divides by its size, else a group of one: the layer is replicated instead of cut."""
        return self if all(count % self.size == 0 for count in counts) else TensorParallel.single()

    def shard(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's equal share of `tensor` along `dim`."""
        share = tensor.shape[dim] // self.size
        return tensor.narrow(dim, self.rank * share, share)
