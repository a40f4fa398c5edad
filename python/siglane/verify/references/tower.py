"""transformers' SiglipVisionModel with every stage read."""

from __future__ import annotations

from typing import Any

import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from siglane.verify.references.files import Raw, Tensors, ready
from siglane.verify.references.pixels import patches_of
from siglane.verify.references.tapping import tapping


class SiglipTower:
    """raw: a `SiglipVisionConfig`'s JSON; tensors: with or without the infix `vision_model.`."""

    def __init__(
        self, raw: Raw, tensors: Tensors, device: torch.device, dtype: torch.dtype, *, head: bool = False
    ) -> None:
        facts = dict(raw, vision_use_head=head and raw.get("vision_use_head", True))
        self.config: Any = SiglipVisionConfig.from_dict(facts)
        self.device, self.dtype = device, dtype
        self.model: Any = SiglipVisionModel(self.config)
        ready(self.model, tensors.under("vision_model.", ""), device, dtype)

    @property
    def side(self) -> int:
        """Pixels along a side."""
        side: int = self.config.image_size
        return side

    @property
    def grid(self) -> int:
        """Patches along a side."""
        patch_size: int = self.config.patch_size
        return self.side // patch_size

    def run(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """pixels f32 `[B, 3, H, W]` -> preprocessing, patch_embedding, positions, block.N, post_layernorm; pooled."""
        modules = {
            "patch_embedding": self.model.embeddings.patch_embedding,
            "positions": self.model.embeddings,
            **{f"block.{number}": layer for number, layer in enumerate(self.model.encoder.layers)},
            "post_layernorm": self.model.post_layernorm,
        }
        with torch.no_grad(), tapping(modules) as taps:
            output = self.model(pixel_values=pixels.to(self.device, self.dtype))
        taps["preprocessing"] = patches_of(pixels.to(self.dtype), self.config.patch_size)
        if output.pooler_output is not None:
            taps["pooled"] = output.pooler_output.cpu()
        return taps

    def read_at(self, pixels: torch.Tensor, layer: int) -> dict[str, torch.Tensor]:
        """The stages up to transformers' `hidden_states[layer]`, which are the features."""
        taps = self.run(pixels)
        layers = self.config.num_hidden_layers
        used = layer if layer >= 0 else layers + 1 + layer
        for number in range(used, layers):
            del taps[f"block.{number}"]
        del taps["post_layernorm"]
        return {**taps, "features": taps[f"block.{used - 1}"] if used else taps["positions"]}
