"""R-4B: transformers' LLaVA-OneVision with another projector; the model itself has no class there."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from siglane.verify.references.files import classes_in, read_json
from siglane.verify.references.llava_onevision import LlavaOnevision
from siglane.verify.references.reference import ReferenceFamily


class PreNormProjector(nn.Module):
    """What vLLM's models/rvl.py and models/bee.py compute."""

    def __init__(self, config: Any, widening: int) -> None:
        super().__init__()
        wide, out = config.vision_config.hidden_size, config.text_config.hidden_size
        self.pre_norm = nn.LayerNorm(wide, eps=1e-6)
        self.linear_1 = nn.Linear(wide, out * widening)
        self.linear_2 = nn.Linear(out * widening, out)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.linear_2(nn.functional.gelu(self.linear_1(self.pre_norm(image_features))))
        return found


class R4B(LlavaOnevision):
    widening: ClassVar[int] = 1
    template = ""

    def built(self) -> Any:
        model: Any = super().built()
        model.model.multi_modal_projector = PreNormProjector(self.config, self.widening)
        return model


FAMILY = ReferenceFamily(
    name="r_4b",
    speaks=True,
    matches=lambda folder: "RForConditionalGeneration" in classes_in(read_json(folder / "config.json")),
    load=R4B,
)
