"""SigLIP2 NaFlex checkpoints: the tower on its own, any aspect, a budget of patches (formats.md 2.2).

Features are the reference's `last_hidden_state` without its padding. Fixed-resolution SigLIP2 is `families/siglip.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace

from siglane.config.preprocess import SIGLIP2, ImageProcessorConfig, PreprocessConfig
from siglane.config.reader import ConfigReader
from siglane.config.vision import VisionConfig
from siglane.errors import ConfigError
from siglane.families.siglip import Siglip
from siglane.families.stated import PREPROCESSOR, image_processor
from siglane.tiling.naflex import NaFlex
from siglane.types import Grid
from siglane.weights.hub import Checkpoint


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
        processor = image_processor(checkpoint) or ConfigReader({}, PREPROCESSOR)
        processor.agree("patch_size", vision.patch_size, "the tower's", 16)
        pixels = ImageProcessorConfig.from_hf(processor.raw, SIGLIP2, name=processor.name)
        rule = NaFlex(
            patch_size=vision.patch_size,
            max_num_patches=processor.size("max_num_patches", 256),
            resample=pixels.resample,
        )
        naflex = replace(
            vision, position_grid=Grid(side, side), position_resize="bilinear_antialias", patch_layout="channel_last"
        )
        return naflex, PreprocessConfig.of(rule, pixels)
