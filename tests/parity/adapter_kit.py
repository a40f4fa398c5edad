"""Adapters by PEFT: on transformers' models, and on module trees that have a checkpoint's names."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

State = Mapping[str, torch.Tensor]
TABLES = ("embed_tokens", "token_embedding", "position_embedding")


def train(model: nn.Module, folder: Path, *, seed: int = 5, **lora: Any) -> PeftModel:
    """`model` with an adapter around it whose every tensor is random, saved in `folder`. lora: of `LoraConfig`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied heads and fan_in_fan_out
        adapted: PeftModel = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8} | lora)).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        adapted.create_or_update_model_card = lambda _: None  # a page of text that takes longer than the weights
        adapted.save_pretrained(str(folder))
    return adapted


def module_tree(state: State) -> nn.Module:
    """Linear layers, convolutions, tables and norms that hold `state` under its names; nothing runs them."""
    root = nn.Module()
    for path in dict.fromkeys(name.rpartition(".")[0] for name in state):
        leaves = {name.rpartition(".")[2]: tensor for name, tensor in state.items() if name.rpartition(".")[0] == path}
        place = root
        *parents, last = path.split(".")
        for parent in parents:
            if parent not in dict(place.named_children()):
                place.add_module(parent, nn.Module())
            place = place.get_submodule(parent)
        module = _module(last, leaves) if path else root
        for leaf, tensor in leaves.items():
            module.register_parameter(leaf, nn.Parameter(tensor.clone(), requires_grad=False))
        if path:
            for name, child in dict(place.named_children()).get(last, nn.Module()).named_children():
                module.add_module(name, child)
            place.add_module(last, module)
    return root


def _module(name: str, leaves: State) -> nn.Module:
    weight = leaves.get("weight")
    if weight is None or weight.ndim == 1:
        return nn.Module()
    if weight.ndim == 4:
        return nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], weight.shape[2], bias="bias" in leaves)
    if name in TABLES:
        return nn.Embedding(*weight.shape)
    return nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in leaves)


def tensors_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of every weights file below `folder`, by the file's path."""
    files = sorted(file for file in folder.rglob("*.safetensors") if file.name != "adapter_model.safetensors")
    return {str(file.relative_to(folder)): load_file(file) for file in files}


def named(folder: Path, prefixes: Mapping[str, str]) -> State:
    """All tensors below `folder`; prefixes: of the names of each file's."""
    return {
        prefixes.get(file, "") + name: tensor
        for file, state in tensors_of(folder).items()
        for name, tensor in state.items()
    }


def write_merged(base: Path, adapter: Path, whole: Path, prefixes: Mapping[str, str]) -> None:
    """`whole`, a copy of `base`, gets what PEFT merges. prefixes: of the names of each file's tensors."""
    stored = tensors_of(base)
    tree = module_tree(named(base, prefixes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = PeftModel.from_pretrained(tree, str(adapter)).merge_and_unload().state_dict()
    for file, state in stored.items():
        merged = {name: found[prefixes.get(file, "") + name].contiguous().clone() for name in state}
        save_file(merged, whole / file, metadata={"format": "pt"})
