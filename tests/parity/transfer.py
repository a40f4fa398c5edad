"""Shared by the parity tests of the core: random references, their tensors in our modules, and the bar to pass."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from siglane.nn.linear import ShardedModule

MAX_ABS, MIN_COSINE = 2e-4, 0.99999

# (pattern of a reference's tensor name, our parameter, the part of it); the first match counts
Renames = tuple[tuple[str, str, str], ...]

SIGLIP: Renames = (
    (r"embeddings\.(patch|position)_embedding\.(\w+)", r"\1_embedding.\2", ""),
    (r"encoder\.layers\.(\d+)\.layer_norm(\d)\.(\w+)", r"blocks.\1.norm\2.\3", ""),
    (r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(\w+)", r"blocks.\1.attention.qkv.\3", r"\2"),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.(\w+)", r"blocks.\1.attention.out_proj.\2", ""),
    (r"encoder\.layers\.(\d+)\.mlp\.(fc\d)\.(\w+)", r"blocks.\1.mlp.\2.\3", ""),
    (r"post_layernorm\.(\w+)", r"post_norm.\1", ""),
    (r"head\.attention\.(in_proj_\w+|out_proj\.\w+)", r"head.\1", ""),
    (r"head\.layernorm\.(\w+)", r"head.norm.\1", ""),
    (r"head\.mlp\.(fc\d\.\w+)", r"head.\1", ""),
    (r"head\.probe", "head.probe", ""),
)

QWEN: Renames = (
    (r"model\.(embed_tokens|norm)\.weight", r"\1.weight", ""),
    (r"lm_head\.weight", "lm_head.weight", ""),
    (r"model\.layers\.(\d+)\.(input|post_attention)_layernorm\.weight", r"blocks.\1.\2_norm.weight", ""),
    (r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(\w+)", r"blocks.\1.attention.qkv.\3", r"\2"),
    (r"model\.layers\.(\d+)\.self_attn\.(o_proj\.\w+|[qk]_norm\.weight)", r"blocks.\1.attention.\2", ""),
    (r"model\.layers\.(\d+)\.mlp\.(gate|up)_proj\.weight", r"blocks.\1.mlp.gate_up.weight", r"\2"),
    (r"model\.layers\.(\d+)\.mlp\.down_proj\.weight", r"blocks.\1.mlp.down_proj.weight", ""),
)


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


def fill(model: nn.Module, tensors: Mapping[str, torch.Tensor], renames: Renames) -> set[str]:
    """Loads `tensors` of a reference into our `model`; every part of every parameter exactly once.

    Returns the reference's tensors for which the model has no place.
    """
    missing = {(name, part) for name, _ in model.named_parameters() for part in parts_of(model, name)}
    unused = set()
    for their_name, tensor in tensors.items():
        name, part = renamed(their_name, renames)
        if (name, part) not in missing:
            unused.add(their_name)
            continue
        missing.remove((name, part))
        load(model, name, part, tensor)
    assert not missing, f"not filled: {sorted(missing)}"
    return unused


def renamed(their_name: str, renames: Renames) -> tuple[str, str]:
    for pattern, name, part in renames:
        if match := re.fullmatch(pattern, their_name):
            return match.expand(name), match.expand(part)
    raise AssertionError(f"no rule for the reference's {their_name}")


def parts_of(model: nn.Module, name: str) -> Iterable[str]:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    return module.parts(leaf) if isinstance(module, ShardedModule) else ("",)


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
