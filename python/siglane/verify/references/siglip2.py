"""SigLIP2 NaFlex: transformers' Siglip2VisionModel, padded and masked as it wants it (formats.md 2.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import Siglip2VisionConfig, Siglip2VisionModel

from siglane.verify.references.adapter import tensors_of
from siglane.verify.references.files import processor_json, read_json, ready, unset
from siglane.verify.references.pixels import Processing
from siglane.verify.references.reference import ReferenceFamily
from siglane.verify.references.tapping import tapping
from siglane.verify.references.tower import stages_of
from siglane.verify.stages import Trace

MODEL_TYPES = ("siglip2", "siglip2_vision_model")


class Siglip2:
    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, adapter: Path | None = None) -> None:
        root, processor = read_json(folder / "config.json"), processor_json(folder)
        raw = root["vision_config"] if root["model_type"] == "siglip2" else root
        self.config: Any = Siglip2VisionConfig.from_dict(raw)
        self.device, self.dtype = device, dtype
        self.model: Any = unset(lambda: Siglip2VisionModel(self.config))
        ready(self.model, tensors_of(folder, adapter).under("vision_model.", ""), device, dtype)
        resize_one_column_exactly(self.model.embeddings)
        self.most = processor.get("max_num_patches", 256)
        # the size is computed for each picture; the processor's defaults are those of Siglip2ImageProcessor
        self.processing: Processing = Processing.of(processor | {"size": 1}, 1, Image.Resampling.BILINEAR)

    def run(self, pictures: Sequence[Image.Image], prompt: str, steps: int) -> Trace:
        return self.encoded([self.prepared(picture) for picture in pictures])

    def prepared(self, picture: Image.Image) -> torch.Tensor:
        """f32 `[3, H, W]` of at most `most` patches."""
        size = resized_to(*picture.size, self.config.patch_size, self.most)
        return self.processing.normalised(picture.resize(size, self.processing.resample))

    def encoded(self, pictures: Sequence[torch.Tensor]) -> Trace:
        """Prepared pictures -> all stages, padding left out."""
        patch_size = self.config.patch_size
        patches = [channel_last(pixels, patch_size) for pixels in pictures]
        padded = torch.zeros(len(patches), self.most, patches[0].shape[1])
        mask = torch.zeros(len(patches), self.most, dtype=torch.int64, device=self.device)
        for number, rows in enumerate(patches):
            padded[number, : len(rows)], mask[number, : len(rows)] = rows, 1
        modules = {**stages_of(self.model), "features": self.model.post_layernorm}
        with tapping(modules, rows=lambda output: output[mask.bool()]) as taps:
            output = self.model(
                pixel_values=padded.to(self.device, self.dtype),
                pixel_attention_mask=mask,
                spatial_shapes=torch.tensor([[side // patch_size for side in one.shape[1:]] for one in pictures]),
            )
        pooled = {} if output.pooler_output is None else {"pooled": output.pooler_output.cpu()}
        return {"preprocessing": torch.cat(patches).to(self.dtype), **taps, **pooled}


def resize_one_column_exactly(embeddings: Any) -> None:
    """Makes `Siglip2VisionEmbeddings` of every version agree on grids of one column.

    Since 5.24 transformers multiplies by the filter's weights; before, it calls torch's antialiasing, which on CPUs
    gives every row of one column the first row's positions. Their function is right for one row: such a grid goes
    through it as its transpose.
    """
    theirs = embeddings.resize_positional_embeddings

    def resized(table: torch.Tensor, shapes: torch.Tensor, max_length: int) -> torch.Tensor:
        """table `[side, side, width]`, shapes (h, w) `[B, 2]` -> `[B, max_length, width]`."""
        upright = theirs(table, shapes, max_length)
        lying = theirs(table.transpose(0, 1), shapes.flip(1), max_length)
        return torch.where((shapes[:, 1] == 1)[:, None, None].to(upright.device), lying, upright)

    embeddings.resize_positional_embeddings = resized


def resized_to(width: int, height: int, patch_size: int, most: int) -> tuple[int, int]:
    """Pixels of the largest multiple of patches that keeps the aspect: `get_image_size_for_max_num_patches`."""

    def scaled(scale: float) -> tuple[int, int]:
        across, down = (max(1, math.ceil(side * scale / patch_size)) for side in (width, height))
        return across * patch_size, down * patch_size

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        across, down = scaled(middle)
        if across * down <= most * patch_size**2:
            low = middle
        else:
            high = middle
    return scaled(low)


def channel_last(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """`[3, H, W]` -> `[patches, patch_size**2 * 3]`, elements in the order (y, x, channel)."""
    rows = pixels.unfold(1, patch_size, patch_size).unfold(2, patch_size, patch_size)  # [3, h, w, y, x]
    return rows.permute(1, 2, 3, 4, 0).flatten(2).flatten(0, 1)


FAMILY = ReferenceFamily(
    name="siglip2",
    speaks=False,
    matches=lambda folder: read_json(folder / "config.json").get("model_type") in MODEL_TYPES,
    load=Siglip2,
)
