"""A tiny random SigLIP2 NaFlex checkpoint: the tower alone, or with its text tower as google/siglip2-*-naflex are."""

from __future__ import annotations

from pathlib import Path

from checkpoints import config_of, preprocessor_of, randomise, write_checkpoint
from transformers import Siglip2Config, Siglip2Model, Siglip2VisionConfig, Siglip2VisionModel

from siglane.verify.references.files import unset
from siglane.verify.references.siglip2 import resize_one_column_exactly

PATCH = 16


def write_siglip2_checkpoint(
    folder: Path, *, full: bool = False, infix: bool = True, num_patches: int = 16, budget: int = 64, seed: int = 0
) -> Siglip2VisionModel:
    """Returns the reference's vision tower. num_patches: of the learned grid; budget: max_num_patches of the file."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = Siglip2VisionConfig(**sizes, patch_size=PATCH, num_patches=num_patches)
    tower: Siglip2VisionModel = unset(lambda: Siglip2VisionModel(vision)).eval()
    resize_one_column_exactly(tower.embeddings)
    randomise(tower, seed)
    state = {("vision_model." if infix or full else "") + name: value for name, value in tower.state_dict().items()}
    raw = config_of(tower) | {"architectures": ["Siglip2VisionModel"]}
    if full:
        config = Siglip2Config(vision_config=vision.to_dict(), text_config={**sizes, "vocab_size": 64})
        model = unset(lambda: Siglip2Model(config))
        randomise(model, seed + 1)
        state |= {name: value for name, value in model.state_dict().items() if not name.startswith("vision_model.")}
        raw = config_of(model) | {"architectures": ["Siglip2Model"]}
    preprocessor = preprocessor_of("Siglip2ImageProcessor", 2, patch_size=PATCH, max_num_patches=budget)
    write_checkpoint(folder, raw, state, preprocessor=preprocessor)
    return tower
