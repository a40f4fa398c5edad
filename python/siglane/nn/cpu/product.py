"""The matrix product behind every linear layer, by the fastest float32 kernel the machine has."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from siglane.nn.act import activate
from siglane.types import Activation

# activations that oneDNN applies to a product's tiles while they are in cache: name and variant
FUSED: dict[Activation, tuple[str, str]] = {"gelu_tanh": ("gelu", "tanh"), "gelu_erf": ("gelu", "none")}


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: Activation | None = None
) -> torch.Tensor:
    """`x W^T + b`, then `activation`: x `[..., K]`, weight `[N, K]`, bias `[N]` -> `[..., N]`.

    On CPUs float32 goes to oneDNN, whose product is faster than torch's default on some processors
    (`python benchmark/machine.py`); its sums are float32 too. RuntimeError when a packed weight (`packing.py`) is to be
    trained.
    """
    if uses_onednn(x, weight, bias):
        name, variant = ("none", "") if activation is None else FUSED.get(activation, ("none", ""))
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], variant)
        return product if activation is None or activation in FUSED else activate(product, activation)
    product = F.linear(x, _dense(weight) if weight.is_mkldnn else weight, bias)
    return product if activation is None else activate(product, activation)


def uses_onednn(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether x, multiplied with tensors of its device and dtype, goes to oneDNN: it has no gradient and knows nothing
    of autocast's bfloat16, and torch.compile has a lowering of its own, for frozen weights only."""
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if not on_cpu or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return not wants_gradient(x, *others)


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _dense(packed: torch.Tensor) -> torch.Tensor:
    """A packed weight as every other product reads it: behind it a gradient may flow, or autocast choose the dtype."""
    if wants_gradient(packed):
        raise RuntimeError("a packed weight cannot be trained; load the model again and leave out optimise")
    return packed.to_dense()
