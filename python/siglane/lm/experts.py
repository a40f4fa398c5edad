"""Qwen3-MoE's sparse MLP: every token goes through a few of many small MLPs, chosen by a router (formats.md 8.1).

Source: transformers `models/qwen3_moe/modeling_qwen3_moe.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from siglane.config.language import ExpertsConfig, LanguageConfig
from siglane.lm.mlp import DecoderMLP
from siglane.nn.cpu.product import linear
from siglane.nn.experts import Mixing, Routing, mixed
from siglane.nn.linear import ShardedModule, check_shape, copy_checked
from siglane.nn.parallel import TensorParallel
from siglane.nn.plan import Rule, parts
from siglane.nn.quantise import Given, Weight, own

Turn = Callable[[torch.Tensor], torch.Tensor]  # a weight -> the same in another basis, f64


class SparseMLP(nn.Module):
    """`[T, hidden_size]` -> the same: of each token's experts the sum of `weight * down(silu(gate(x)) * up(x))`.

    The router computes in the dtype of x, its softmax over all experts in float32. Every rank holds a share of each
    expert's width, and the ranks' sums are added once.
    """

    def __init__(self, hidden_size: int, experts: ExpertsConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp.divides(experts.size)
        self.routing = Routing(experts.per_token, experts.normalised)
        self.router = nn.Parameter(torch.empty(experts.count, hidden_size))
        self.experts: nn.Module = Experts(hidden_size, experts, self.tp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tp.all_reduce(self.experts(x, *self.routing(linear(x, self.router))))

    def added(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """`residual + self(x)`"""
        return residual + self(x).to(residual.dtype)

    def separate(self, config: LanguageConfig) -> Experts:
        """Its experts are `SeparateExperts` then. Returns what they were."""
        stacked = self.experts
        assert isinstance(stacked, Experts)
        self.experts = SeparateExperts(config, stacked)
        return stacked

    @torch.no_grad()
    def separated(self, config: LanguageConfig, reader: Turn, writer: Turn) -> Given:
        """Separates the experts, whose parts were kept, and turns the router. Returns what gives their layers weights,
        float32, one by one as they are asked for; other layers give their own. reader, writer: turn a weight that reads
        the stream, and one that writes it."""
        kept = self.separate(config).kept
        assert kept is not None
        self.router = nn.Parameter(reader(self.router).float(), requires_grad=False)
        names = {layer: name for name, layer in self.experts.named_modules()}

        def given(layer: nn.Module) -> tuple[Weight, torch.Tensor | None]:
            match names.get(layer, "").split("."):
                case [number, "gate_up"]:
                    return reader(torch.cat([kept.pop(f"{number}.gate"), kept.pop(f"{number}.up")])).float(), None
                case [number, "down_proj"]:
                    return writer(kept.pop(f"{number}.down")).float(), None
            return own(layer)

        return given


class Experts(ShardedModule):
    """Weights below each other, as `Mixing` takes them: gate and up of one expert `[2 * width, hidden_size]`, down
    `[hidden_size, width]`, where `width` is this rank's share. kept: where a checkpoint's parts then wait as views of
    its own, and nothing is copied."""

    kept: dict[str, torch.Tensor] | None = None

    def __init__(self, hidden_size: int, experts: ExpertsConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.hidden_size, self.size, self.count, self.tp = hidden_size, experts.size, experts.count, tp
        self.mixing, self.width = Mixing(experts.count), experts.size // tp.size
        self.gate_up = nn.Parameter(torch.empty(experts.count * 2 * self.width, hidden_size))
        self.down = nn.Parameter(torch.empty(experts.count * hidden_size, self.width))

    def forward(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.mixing(x, self.gate_up, self.down, weights, chosen)
        return y

    def parts(self, name: str) -> tuple[str, ...]:
        kinds = ("gate", "up") if name == "gate_up" else ("down",)
        return tuple(f"{expert}.{kind}" for expert in range(self.count) for kind in kinds)

    def part_size(self, part: str) -> int:
        return self.hidden_size if part.endswith(".down") else self.size

    def load_part(self, name: str, part: str, tensor: torch.Tensor) -> None:
        number, _, kind = part.partition(".")
        wide, down = (self.hidden_size, self.size), kind == "down"
        check_shape(tensor, *(wide if down else wide[::-1]))
        share = self.tp.shard(tensor, 1 if down else 0)
        if self.kept is not None:
            self.kept[part] = share
        else:
            place = int(number) if down else 2 * int(number) + (kind == "up")
            copy_checked(self.get_parameter(name).narrow(0, place * len(share), len(share)), share)


class SeparateExperts(nn.ModuleList):
    """Each an MLP of its own, at first on the meta device, whose layers are replaced by ones of fewer bits as a dense
    block's are. Rows are float32, whatever the model's dtype: so the router stays exact, which is a thousandth of the
    weights, and whose rounding sends tokens to other experts, where any other rounding moves a result a little."""

    def __init__(self, config: LanguageConfig, stacked: Experts) -> None:
        narrow = replace(config, intermediate_size=stacked.width, mlp_bias=False)  # this rank's share, added up once
        with torch.device("meta"):
            super().__init__(DecoderMLP(narrow, TensorParallel.single()) for _ in range(stacked.count))

    def forward(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return mixed(x, lambda number, rows: self[number](rows), len(self), weights, chosen)


def experts_rules(experts: ExpertsConfig) -> tuple[Rule, ...]:
    """transformers' `Qwen3MoeSparseMoeBlock` as it is saved, an expert in each tensor, and as it has it in memory."""
    numbers = range(experts.count)
    return (
        Rule("gate.weight", "router"),
        *parts("experts.{e}.*_proj.weight", "experts.gate_up", "gate up", "{e}.*"),
        Rule("experts.{e}.down_proj.weight", "experts.down", "{e}.down"),
        Rule("experts.gate_up_proj", "experts.gate_up", "+".join(f"{e}.gate+{e}.up" for e in numbers)),
        Rule("experts.down_proj", "experts.down", "+".join(f"{e}.down" for e in numbers)),
    )
