"""Checkpoints that break behind their view: what becomes of a part of a VILA folder, and what a host says at last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from host_cases import rewrite

State = dict[str, torch.Tensor]
Change = Callable[[State], State]


def without(name: str) -> Change:
    return lambda state: {key: value for key, value in state.items() if key != name}


def cut(name: str) -> Change:
    return lambda state: state | {name: state[name][:-1].clone()}


def with_another(name: str) -> Change:
    return lambda state: state | {name: torch.ones(2)}


BROKEN: dict[str, tuple[str, Change, str]] = {
    "missing": (
        "vision_tower",
        without("vision_model.encoder.layers.0.mlp.fc1.bias"),
        "the checkpoint fills 71 of 72 parameters; missing: vision.encoder.tower.blocks.0.mlp.fc1.bias",
    ),
    "of another shape": (
        "mm_projector",
        cut("layers.1.weight"),
        "tensor mm_projector.layers.1.weight has shape [287], the model needs [288]",
    ),
    "unknown": (
        "llm",
        with_another("model.layers.0.surprise"),
        "tensor llm.model.layers.0.surprise is not known to this model",
    ),
}


def break_behind_view(folder: Path, what: str) -> str:
    """What a host that serves the view of `folder` is to say from now on."""
    part, change, message = BROKEN[what]
    rewrite(folder / part / "model.safetensors", change)
    return message
