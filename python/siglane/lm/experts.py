"""Qwen3-MoE's sparse MLP: every token goes through a few of many small MLPs, chosen by a router (formats.md 8.1).

Source: transformers `models/qwen3_moe/modeling_qwen3_moe.py`.
"""

from __future__ import annotations

import torch
from torch import nn

from siglane.config.language import ExpertsConfig
from siglane.nn.cpu.product import linear
from siglane.nn.experts import Mixing, Routing
from siglane.nn.linear import ShardedModule, check_shape
from siglane.nn.parallel import TensorParallel
from siglane.nn.plan import Rule, parts


class SparseMLP(nn.Module):
    """`[T, hidden_size]` -> the same: of each token's experts the sum of `weight * down(silu(gate(x)) * up(x))`.

    The router computes in the dtype of x, its softmax over all experts in float32. Every rank holds a share of each
    expert's width, and the ranks' sums are added once.
    """

    def __init__(self, hidden_size: int, experts: ExpertsConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.experts, self.tp = experts, tp.divides(experts.size)
        self.routing, self.mixing = Routing(experts.per_token, experts.normalised), Mixing(experts.count)
        self.router = nn.Parameter(torch.empty(experts.count, hidden_size))
        self.stacked = Experts(hidden_size, experts, self.tp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.routing(linear(x, self.router))
        return self.tp.all_reduce(self.mixing(x, self.stacked.gate_up, self.stacked.down, weights, chosen))

    def added(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """`residual + self(x)`"""
        return residual + self(x)


class Experts(ShardedModule):
    """The experts' weights below each other, as `Mixing` takes them: gate and up of one `[2 * width, hidden_size]`,
    down `[hidden_size, width]`, where `width` is this rank's share."""

    def __init__(self, hidden_size: int, experts: ExpertsConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.hidden_size, self.experts, self.tp = hidden_size, experts, tp
        width = experts.size // tp.size
        self.gate_up = nn.Parameter(torch.empty(experts.count * 2 * width, hidden_size))
        self.down = nn.Parameter(torch.empty(experts.count * hidden_size, width))

    def parts(self, name: str) -> tuple[str, ...]:
        kinds = ("gate", "up") if name == "gate_up" else ("down",)
        return tuple(f"{expert}.{kind}" for expert in range(self.experts.count) for kind in kinds)

    def part_size(self, part: str) -> int:
        return self.hidden_size if part.endswith(".down") else self.experts.size

    def load_part(self, name: str, part: str, tensor: torch.Tensor) -> None:
        number, _, kind = part.partition(".")
        share = self.share(part, tensor)
        place = int(number) if kind == "down" else 2 * int(number) + (kind == "up")
        with torch.no_grad():
            self.get_parameter(name).narrow(0, place * len(share), len(share)).copy_(share)

    def share(self, part: str, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's of a part, a view of the whole one."""
        wide, down = (self.hidden_size, self.experts.size), part.endswith(".down")
        check_shape(tensor, *(wide if down else wide[::-1]))
        return self.tp.shard(tensor, 1 if down else 0)


def experts_rules(experts: ExpertsConfig) -> tuple[Rule, ...]:
    """transformers' `Qwen3MoeSparseMoeBlock` as it is saved, an expert in each tensor, and as it has it in memory."""
    numbers = range(experts.count)
    return (
        Rule("gate.weight", "router"),
        *parts("experts.{e}.*_proj.weight", "stacked.gate_up", "gate up", "{e}.*"),
        Rule("experts.{e}.down_proj.weight", "stacked.down", "{e}.down"),
        Rule("experts.gate_up_proj", "stacked.gate_up", "+".join(f"{e}.gate+{e}.up" for e in numbers)),
        Rule("experts.down_proj", "stacked.down", "+".join(f"{e}.down" for e in numbers)),
    )
