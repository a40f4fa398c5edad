"""Both towers' linear layers in fewer bits."""

from __future__ import annotations

import torch

from siglane.families.dual import DualModel
from siglane.nn.quant import quantise
from siglane.tagging.settings import Quantization


def quantize(model: DualModel, kind: Quantization, device: torch.device) -> DualModel:
    """`model` with its weights kept as `kind` says, "none": as it is. UserError for a kind not available here."""
    if kind != "none":
        quantise(model, kind, device)
    return model
