"""Plain SigLIP checkpoints: the tower on its own, as `siglane encode` runs it (formats.md section 1).

Features are the reference's `last_hidden_state`: every block, then post_layernorm. SigLIP2 of fixed resolution is the
same model; NaFlex is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from siglane.config.preprocess import PreprocessConfig
from siglane.config.reader import ConfigReader
from siglane.config.vision import VisionConfig
from siglane.errors import ConfigError
from siglane.types import Box, Features, Grid, ImageLayout, Size, Tile
from siglane.weights.hub import Checkpoint
from siglane.weights.plan import Elsewhere, Ignore, WeightPlan, tower_plan

MODEL_TYPES = ("siglip", "siglip_vision_model")
PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """The facts of a tower on its own."""

    vision: VisionConfig
    preprocess: PreprocessConfig

    def layouts(self, sizes: Sequence[Size]) -> tuple[ImageLayout, ...]:
        """Every image is squashed to one tile."""
        tile, grid = self.preprocess.tile, self.vision.position_grid
        whole = Tile(tile, Box(0, 0, tile.width, tile.height), grid)
        return tuple(ImageLayout(size, (whole,), (Features(grid.area),), Grid(1, 1)) for size in sizes)


def matches(checkpoint: Checkpoint) -> bool:
    return checkpoint.has("config.json") and checkpoint.json("config.json").get("model_type") in MODEL_TYPES


def read_config(checkpoint: Checkpoint, *, head: bool = False) -> EncoderConfig:
    """The facts of a SigLIP checkpoint, with or without a text tower beside the vision tower.

    head: keep the MAP pooling head, where the checkpoint has one; features do not need it.
    """
    root = ConfigReader(checkpoint.json("config.json"), "config.json")
    reader = root if root.value("model_type", str) == "siglip_vision_model" else root.section("vision_config")
    vision = VisionConfig.from_hf(reader.raw, feature_layer=-1, post_norm=True, name=reader.name)
    side = reader.size("image_size", 224)
    raw = {"size": {"height": side, "width": side}}
    preprocess = PreprocessConfig.from_hf(
        checkpoint.json(PREPROCESSOR) if checkpoint.has(PREPROCESSOR) else raw, tiling="squash", name=PREPROCESSOR
    )
    tile, grid = preprocess.tile, vision.position_grid
    if (tile.height // vision.patch_size, tile.width // vision.patch_size) != grid:
        raise ConfigError(
            f"{PREPROCESSOR}: {tile.width}x{tile.height} pixels do not hold the tower's {grid.h}x{grid.w} patches"
        )
    return EncoderConfig(vision=replace(vision, use_head=head and vision.use_head), preprocess=preprocess)


def plan(config: EncoderConfig) -> WeightPlan:
    """Checkpoint names -> `VisionEncoderModel`."""
    zero_shot = "the zero-shot scores' scale and bias, which features do not need"
    others = (Elsewhere("text_model."), Ignore("logit_scale", zero_shot), Ignore("logit_bias", zero_shot))
    return tower_plan(config.vision).under("", "tower.") + WeightPlan(others)
