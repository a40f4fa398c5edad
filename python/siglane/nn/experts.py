"""Which experts a token goes through, and what they give together: the parts of a sparse MLP without weights, for which
other kernels may stand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from siglane.nn.act import swiglu
from siglane.nn.cpu.product import linear


class Routing(nn.Module):
    """A router's results `[T, experts]` -> weights, in their dtype, and numbers of each token's experts, both `[T,
    per_token]`. The softmax over all experts is float32; normalised: the chosen weights add up to one."""

    def __init__(self, per_token: int, normalised: bool) -> None:
        super().__init__()
        self.per_token, self.normalised = per_token, normalised

    def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        probabilities = logits.softmax(-1, dtype=torch.float32)
        weights, chosen = probabilities.topk(self.per_token, dim=-1)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(logits.dtype), chosen


class Mixing(nn.Module):
    """x `[T, K]` -> the same: of each token's experts the sum of `weight * down(silu(gate(x)) * up(x))`.

    gate_up `[count * 2 * N, K]` and down `[count * K, N]`: all experts below each other; weights and chosen as of
    `Routing`. With a share of each expert's width, this rank's part of the sum.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(
        self, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        gates, downs = gate_up.unflatten(0, (self.count, -1)), down.unflatten(0, (self.count, -1))

        def expert(number: int, rows: torch.Tensor) -> torch.Tensor:
            return linear(swiglu(linear(rows, gates[number])), downs[number])

        return mixed(x, expert, self.count, weights, chosen)


def mixed(
    x: torch.Tensor,
    expert: Callable[[int, torch.Tensor], torch.Tensor],
    count: int,
    weights: torch.Tensor,
    chosen: torch.Tensor,
) -> torch.Tensor:
    """x `[T, K]` -> the same: of each token's experts the sum of `weight * expert(number, x)`, one expert after the
    other. weights and chosen as of `Routing`, of `count` experts."""
    order = chosen.flatten().argsort(stable=True)  # places of `chosen`, expert after expert
    counts = chosen.flatten().bincount(minlength=count).tolist()
    y = torch.zeros_like(x)
    for number, places in enumerate(order.split(counts)):
        if len(places):
            tokens = places // chosen.shape[1]
            y = y.index_add(0, tokens, (expert(number, x[tokens]) * weights.flatten()[places, None]).to(y.dtype))
    return y
