"""The projector: merged patches through linear layers to the language model's width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from siglane.config.projector import ActivationLayer, Layer, LinearLayer, NormLayer, ProjectorConfig
from siglane.nn.act import activate
from siglane.nn.linear import ColumnParallelLinear, RowParallelLinear
from siglane.nn.parallel import TensorParallel
from siglane.nn.plan import Rule, WeightPlan
from siglane.projector.downsample import merged_rows
from siglane.types import Grid


class Projector(nn.Module):
    """Features `[N, input_size]` of `grids` -> rows `[T, output_size]`, image after image.

    Linear layers are cut in pairs over the ranks: column parallel, then row parallel. A norm needs whole rows, so a
    layer in front of one gathers its output.
    """

    def __init__(self, config: ProjectorConfig, tp: TensorParallel | None = None) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleDict(_build(config, tp or TensorParallel.single()))

    def forward(self, features: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        x = merged_rows(features, grids, self.config)
        for number, layer in enumerate(self.config.layers):
            x = activate(x, layer.activation) if isinstance(layer, ActivationLayer) else self.layers[str(number)](x)
        return x


def _build(config: ProjectorConfig, tp: TensorParallel) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module] = {}
    cut_before = False  # the previous linear layer left its output cut over the ranks
    for number, layer in enumerate(config.layers):
        if isinstance(layer, NormLayer):
            modules[str(number)] = nn.LayerNorm(layer.size, layer.eps)
        elif isinstance(layer, LinearLayer):
            if cut_before:
                modules[str(number)] = RowParallelLinear(layer.input_size, layer.output_size, bias=layer.bias, tp=tp)
                cut_before = False
            else:
                cut_before = _pairs_with_next(config.layers, number)
                modules[str(number)] = ColumnParallelLinear(
                    layer.input_size, {"": layer.output_size}, bias=layer.bias, tp=tp, gather_output=not cut_before
                )
    return modules


def _pairs_with_next(layers: Sequence[Layer], number: int) -> bool:
    """Whether the next layer that is not an activation is linear."""
    following = next((layer for layer in layers[number + 1 :] if not isinstance(layer, ActivationLayer)), None)
    return isinstance(following, LinearLayer)


def layers_plan(config: ProjectorConfig) -> WeightPlan:
    """The layers under the names that the configuration gives them."""
    stored = ((number, layer) for number, layer in enumerate(config.layers) if not isinstance(layer, ActivationLayer))
    return WeightPlan(tuple(Rule(f"{layer.name}.{{leaf}}", f"layers.{number}.{{leaf}}") for number, layer in stored))
