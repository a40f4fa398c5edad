"""A tiny random SigLIP2 NaFlex checkpoint: the tower alone, or with its text tower as google/siglip2-*-naflex are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from checkpoints import randomise
from safetensors.torch import save_file
from transformers import Siglip2Config, Siglip2Model, Siglip2VisionConfig, Siglip2VisionModel

from siglane.verify.references.siglip2 import resize_one_column_exactly

PATCH = 16


def write_siglip2_checkpoint(
    folder: Path, *, full: bool = False, infix: bool = True, num_patches: int = 16, budget: int = 64, seed: int = 0
) -> Siglip2VisionModel:
    """Returns the reference's vision tower. num_patches: of the learned grid; budget: max_num_patches of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    }  # fmt: skip
    vision = Siglip2VisionConfig(**sizes, patch_size=PATCH, num_patches=num_patches)
    tower = Siglip2VisionModel(vision).eval()
    resize_one_column_exactly(tower.embeddings)
    randomise(tower, seed)
    own = {name.removeprefix("vision_model."): value for name, value in tower.state_dict().items()}
    state = {("vision_model." if infix or full else "") + name: value for name, value in own.items()}
    raw = json.loads(vision.to_json_string(use_diff=False)) | {"architectures": ["Siglip2VisionModel"]}
    if full:
        config = Siglip2Config(vision_config=vision.to_dict(), text_config={**sizes, "vocab_size": 64})
        model = Siglip2Model(config).eval()
        randomise(model, seed + 1)
        state |= {name: value for name, value in model.state_dict().items() if not name.startswith("vision_model.")}
        raw = json.loads(config.to_json_string(use_diff=False)) | {"architectures": ["Siglip2Model"]}
    save_file({name: value.detach().clone() for name, value in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    preprocessor = {
        "image_processor_type": "Siglip2ImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "rescale_factor": 1 / 255,
        "patch_size": PATCH, "max_num_patches": budget,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return tower


def reference_inputs(pixels: list[torch.Tensor], most: int) -> dict[str, torch.Tensor]:
    """Normalised pictures `[3, H, W]` as the reference's padded batch."""
    values, mask, shapes = [], [], []
    for picture in pixels:
        h, w = picture.shape[1] // PATCH, picture.shape[2] // PATCH
        patches = picture.reshape(3, h, PATCH, w, PATCH).permute(1, 3, 2, 4, 0).reshape(h * w, -1)
        values.append(torch.cat((patches, torch.zeros(most - h * w, patches.shape[1]))))
        mask.append(torch.tensor([1] * (h * w) + [0] * (most - h * w)))
        shapes.append(torch.tensor([h, w]))
    return {
        "pixel_values": torch.stack(values),
        "pixel_attention_mask": torch.stack(mask),
        "spatial_shapes": torch.stack(shapes),
    }
