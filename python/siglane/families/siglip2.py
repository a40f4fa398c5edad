"""SigLIP2 NaFlex checkpoints: the tower on its own, any aspect, a budget of patches (formats.md 2.2).

Features are the reference's `last_hidden_state` without its padding. Fixed-resolution SigLIP2 is `families/siglip.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace

from siglane.config.preprocess import ImageProcessorConfig, PreprocessConfig
from siglane.config.projector import vila_projector
from siglane.config.reader import ConfigReader
from siglane.config.vision import VisionConfig
from siglane.config.vlm import ImageFacts
from siglane.errors import ConfigError
from siglane.families.family import TowerFamily
from siglane.families.siglip import plan
from siglane.tiling.naflex import NaFlex
from siglane.types import Grid
from siglane.weights.hub import Checkpoint

MODEL_TYPES = ("siglip2", "siglip2_vision_model")
PREPROCESSOR = "preprocessor_config.json"
BILINEAR = 2  # Siglip2ImageProcessor's default filter


def matches(checkpoint: Checkpoint) -> bool:
    return checkpoint.has("config.json") and checkpoint.json("config.json").get("model_type") in MODEL_TYPES


def read_config(checkpoint: Checkpoint, *, head: bool = False) -> ImageFacts:
    """The facts of a NaFlex checkpoint, with or without a text tower; head as in `families/siglip.py`."""
    root = ConfigReader(checkpoint.json("config.json"), "config.json")
    reader = root if root.value("model_type", str) == "siglip2_vision_model" else root.section("vision_config")
    vision = VisionConfig.from_hf(reader.raw, feature_layer=-1, post_norm=True, name=reader.name)
    patches = reader.size("num_patches", 256)
    side = math.isqrt(patches)
    if side * side != patches:
        raise ConfigError(f"{reader.name}: num_patches {patches} is not a square; the positions' grid is one")
    processor = ConfigReader(checkpoint.json(PREPROCESSOR) if checkpoint.has(PREPROCESSOR) else {}, PREPROCESSOR)
    if processor.size("patch_size", 16) != vision.patch_size:
        raise ConfigError(
            f"{PREPROCESSOR}: patch_size {processor.size('patch_size', 16)} is not the tower's {vision.patch_size}"
        )
    pixels = ImageProcessorConfig.from_hf(processor.raw, resample=BILINEAR, name=PREPROCESSOR)
    rule = NaFlex(
        patch_size=vision.patch_size,
        max_num_patches=processor.size("max_num_patches", 256),
        resample=pixels.resample,
    )
    return ImageFacts(
        vision=replace(
            vision,
            position_grid=Grid(side, side),
            position_resize="bilinear_antialias",
            patch_layout="channel_last",
            use_head=head and vision.use_head,
        ),
        projector=vila_projector("identity", input_size=vision.hidden_size, output_size=vision.hidden_size),
        preprocess=PreprocessConfig.of(rule, pixels),
    )


FAMILY = TowerFamily(
    name="siglip2", known_as=MODEL_TYPES, matches=matches, read_config=read_config, plan=plan
)  # fmt: skip
