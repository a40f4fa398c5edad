"""transformers' tower in OpenVINO, in float32 or in 8 bits by NNCF, as its users would compile it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

CALIBRATION = 16  # batches that NNCF sees the activations of
OPTIONS = {"PERFORMANCE_HINT": "LATENCY"}
FLOAT32 = {**OPTIONS, "INFERENCE_PRECISION_HINT": "f32"}


def installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(name) for name in packages)


class LastHiddenState(nn.Module):
    """A transformers tower as pixels to features."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.model(pixel_values).last_hidden_state
        return features


def converted(model: nn.Module, pixels: torch.Tensor) -> Any:
    import openvino

    return openvino.convert_model(LastHiddenState(model), example_input=pixels)


def in_8_bits(model: nn.Module, pixels: torch.Tensor) -> Any:
    """Weights and activations, static scales by NNCF from batches like `pixels`."""
    import nncf

    batches = [np.asarray(torch.randn(pixels.shape)) for _ in range(CALIBRATION)]
    return nncf.quantize(
        converted(model, pixels),
        nncf.Dataset(batches),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=CALIBRATION,
    )


def run_of(described: Any, options: dict[str, str]) -> Callable[[np.ndarray[Any, Any]], torch.Tensor]:
    """Pixels to features. described: a model of OpenVINO's or the path of one."""
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(described) if isinstance(described, Path) else described, "CPU", options
    )
    return lambda pixels: torch.from_numpy(compiled(pixels)[0])
