"""transformers' SigLIP towers with every stage read."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from siglane.verify.references.files import Raw, Tensors, ready, unset
from siglane.verify.references.pixels import patches_of
from siglane.verify.references.tapping import tapping
from siglane.verify.stages import Trace


def stages_of(tower: Any) -> dict[str, nn.Module]:
    """What gives patch_embedding, positions and block.N."""
    return {
        "patch_embedding": tower.embeddings.patch_embedding,
        "positions": tower.embeddings,
        **{f"block.{number}": layer for number, layer in enumerate(tower.encoder.layers)},
    }


def up_to(taps: Trace, blocks: int) -> Trace:
    """Without the blocks after the first `blocks`, whose output is the features."""
    later = {stage for stage in taps if stage.startswith("block.") and int(stage.removeprefix("block.")) >= blocks}
    kept = {stage: rows for stage, rows in taps.items() if stage not in later}
    return {**kept, "features": taps[f"block.{blocks - 1}"] if blocks else taps["positions"]}


class SiglipTower:
    """raw: a `SiglipVisionConfig`'s JSON; tensors: with or without the infix `vision_model.`."""

    def __init__(
        self, raw: Raw, tensors: Tensors, device: torch.device, dtype: torch.dtype, *, head: bool = False
    ) -> None:
        facts = dict(raw, vision_use_head=head and raw.get("vision_use_head", True))
        config: Any = SiglipVisionConfig
        self.config = config.from_dict(facts)
        self.side: int = self.config.image_size  # pixels along a side
        self.grid = self.side // self.config.patch_size  # patches along a side
        self.device, self.dtype = device, dtype
        self.model: Any = unset(lambda: SiglipVisionModel(self.config))
        ready(self.model, tensors.under("vision_model.", ""), device, dtype)

    def run(self, pixels: torch.Tensor) -> Trace:
        """pixels f32 `[B, 3, H, W]` -> preprocessing, patch_embedding, positions, block.N, post_layernorm; pooled."""
        with tapping({**stages_of(self.model), "post_layernorm": self.model.post_layernorm}) as taps:
            output = self.model(pixel_values=pixels.to(self.device, self.dtype))
        pooled = {} if output.pooler_output is None else {"pooled": output.pooler_output.cpu()}
        return {"preprocessing": patches_of(pixels.to(self.dtype), self.config.patch_size), **taps, **pooled}

    def read_at(self, pixels: torch.Tensor, layer: int) -> Trace:
        """The stages up to transformers' `hidden_states[layer]`, which are the features."""
        taps = self.run(pixels)
        del taps["post_layernorm"]
        return up_to(taps, layer % (self.config.num_hidden_layers + 1))
