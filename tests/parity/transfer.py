"""Shared by the parity tests of the core: random references, their tensors in our modules, and the bar to pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from siglane.nn.linear import ShardedModule
from siglane.nn.plan import WeightPlan
from siglane.weights.load import StrictLoad

MAX_ABS, MIN_COSINE = 2e-4, 0.99999


def randomise(model: nn.Module, seed: int) -> None:
    """Every parameter is drawn anew, norms and biases too: their initial ones and zeros hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(drawn * parameter[0].numel() ** -0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * drawn)
            else:
                parameter.copy_(0.3 * drawn)


def fill(model: nn.Module, tensors: Mapping[str, torch.Tensor], plan: WeightPlan) -> set[str]:
    """Loads `tensors` of a reference into our `model`; every part of every parameter exactly once.

    Returns the reference's tensors for which the model has no place.
    """
    with StrictLoad(plan, model) as load:
        for name, tensor in tensors.items():
            load.take(name, tensor)
    return {name for name, _ in load.ignored}


def load(model: nn.Module, name: str, part: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, ShardedModule):
        module.load_part(leaf, part, tensor)
    else:
        parameter = module.get_parameter(leaf)
        assert parameter.shape == tensor.shape, name
        parameter.data.copy_(tensor)


def assert_parity(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Fails below the bar of docs/structures.md; `pytest -s` shows how far above it the numbers are."""
    assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)}, the reference has {tuple(theirs.shape)}"
    assert theirs.abs().max() > 0.1, f"{name}: the reference is nearly zero, nothing is compared"
    difference = (ours - theirs).abs().max().item()
    cosine = torch.nn.functional.cosine_similarity(ours.double(), theirs.double(), dim=-1).min().item()
    print(f"{name}: max abs {difference:.1e}, cosine {cosine:.8f}")
    assert difference <= MAX_ABS, f"{name} differs by {difference:.2e}"
    assert cosine >= MIN_COSINE, f"{name} has cosine {cosine:.7f}"
