"""Both towers' linear layers in fewer bits."""

from __future__ import annotations

import torch

from siglane.families.two_tower import TwoTowerModel
from siglane.nn.cpu.int8 import quantise
from siglane.settings.tagging import Quantization


def quantize(model: TwoTowerModel, kind: Quantization, device: torch.device) -> TwoTowerModel:
    """`model` with its weights kept as `kind` says, "none": as it is. UserError for a kind not available here."""
    if kind != "none":
        quantise(model, kind, device)
    return model
