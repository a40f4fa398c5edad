"""A decoder whose rows get the same numbers alone and beside others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from siglane.errors import UserError
from siglane.nn.cuda.ops import OPS
from siglane.nn.embedding import VocabParallelEmbedding
from siglane.nn.experts import Mixing
from siglane.nn.quantise import float_layers, quantised
from siglane.nn.trial import first_right

TRIAL = 70, 200, 96  # rows, inputs, outputs: no multiples of the kernel's blocks


class InvariantLinear(nn.Module):
    """`x W^T + b`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = OPS.fixed_product(x.flatten(0, -2), self.weight, self.bias)
        return rows.unflatten(0, x.shape[:-1])


class InvariantTable(VocabParallelEmbedding):
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.tp.all_gather(OPS.fixed_product(hidden, self.weight, None))


def make_invariant(decoder: nn.Module) -> None:
    """Every product of a loaded decoder becomes one that is cut alike for any number of rows. UserError for what has
    none here."""
    if any(isinstance(module, Mixing) for module in decoder.modules()):
        raise _refused("a mixture of experts computes by how many tokens each of them got")
    layers = float_layers(decoder)
    if not layers:
        raise _refused("its weights have fewer bits; take the original checkpoint")
    for parent, name, layer in layers:
        setattr(parent, name, quantised(layer, InvariantLinear))
    for module in decoder.modules():
        if type(module) is VocabParallelEmbedding:
            module.__class__ = InvariantTable


@torch.no_grad()
def try_fixed_product(dtype: torch.dtype, device: torch.device) -> None:
    """EngineError when it gives wrong numbers there."""
    rows, inputs, outputs = TRIAL
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, inputs), (outputs, inputs), (outputs,)
    x, weight, bias = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    weight = weight * inputs**-0.5
    expected = F.linear(x.double(), weight.double(), bias.double()).float()
    first_right(
        "products that are cut alike", {"Triton": OPS.fixed_product}, lambda run: run(x, weight, bias), expected
    )


def _refused(why: str) -> UserError:
    message = f"batch_invariant cannot be promised for this model: {why}"
    return UserError(message, code="unsupported_field", param="batch_invariant")
