"""SigLIP2 NaFlex checkpoints: the tower on its own, any aspect, a budget of patches (formats.md 2.2).

Features are the reference's `last_hidden_state` without its padding. Fixed-resolution SigLIP2 is `families/siglip.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace

from siglane.config.preprocess import ImageProcessorConfig, PreprocessConfig
from siglane.config.reader import ConfigReader
from siglane.config.vision import VisionConfig
from siglane.errors import ConfigError
from siglane.families.files import PREPROCESSOR
from siglane.families.siglip import Siglip
from siglane.tiling.naflex import NaFlex
from siglane.types import Grid
from siglane.weights.hub import Checkpoint

BILINEAR = 2  # Siglip2ImageProcessor's default filter


class Siglip2(Siglip):
    name = "siglip2"
    known_as = ("siglip2", "siglip2_vision_model")

    def pictures(
        self, checkpoint: Checkpoint, reader: ConfigReader, vision: VisionConfig
    ) -> tuple[VisionConfig, PreprocessConfig]:
        patches = reader.size("num_patches", 256)
        side = math.isqrt(patches)
        if side * side != patches:
            raise ConfigError(f"{reader.name}: num_patches {patches} is not a square; the positions' grid is one")
        processor = ConfigReader(checkpoint.optional(PREPROCESSOR), PREPROCESSOR)
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
        naflex = replace(
            vision,
            position_grid=Grid(side, side),
            position_resize="bilinear_antialias",
            patch_layout="channel_last",
        )
        return naflex, PreprocessConfig.of(rule, pixels)
