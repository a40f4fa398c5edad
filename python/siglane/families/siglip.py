"""Plain SigLIP checkpoints: the tower on its own, as `siglane encode` runs it (formats.md section 1).

Features are the reference's `last_hidden_state`: every block, then post_layernorm. SigLIP2 of fixed resolution is the
same model; NaFlex is not.
"""

from __future__ import annotations

from dataclasses import replace

from siglane.config.preprocess import ImageProcessorConfig, PreprocessConfig
from siglane.config.projector import vila_projector
from siglane.config.reader import ConfigReader
from siglane.config.vision import VisionConfig
from siglane.config.vlm import ImageFacts
from siglane.errors import ConfigError
from siglane.families.family import TowerFamily
from siglane.nn.plan import Elsewhere, Ignore, WeightPlan
from siglane.tiling.squash import Squash
from siglane.vision.tower import tower_plan
from siglane.weights.hub import Checkpoint

MODEL_TYPES = ("siglip", "siglip_vision_model")
PREPROCESSOR = "preprocessor_config.json"


def matches(checkpoint: Checkpoint) -> bool:
    return checkpoint.has("config.json") and checkpoint.json("config.json").get("model_type") in MODEL_TYPES


def read_config(checkpoint: Checkpoint, *, head: bool = False) -> ImageFacts:
    """The facts of a SigLIP checkpoint, with or without a text tower beside the vision tower.

    head: keep the MAP pooling head, where the checkpoint has one; features do not need it.
    """
    root = ConfigReader(checkpoint.json("config.json"), "config.json")
    reader = root if root.value("model_type", str) == "siglip_vision_model" else root.section("vision_config")
    vision = VisionConfig.from_hf(reader.raw, feature_layer=-1, post_norm=True, name=reader.name)
    side = reader.size("image_size", 224)
    raw = {"size": {"height": side, "width": side}}
    processor = ImageProcessorConfig.from_hf(
        checkpoint.json(PREPROCESSOR) if checkpoint.has(PREPROCESSOR) else raw, name=PREPROCESSOR
    )
    tile, grid = processor.size, vision.position_grid
    if (tile.height // vision.patch_size, tile.width // vision.patch_size) != grid:
        raise ConfigError(
            f"{PREPROCESSOR}: {tile.width}x{tile.height} pixels do not hold the tower's {grid.h}x{grid.w} patches"
        )
    return ImageFacts(
        vision=replace(vision, use_head=head and vision.use_head),
        projector=vila_projector("identity", input_size=vision.hidden_size, output_size=vision.hidden_size),
        preprocess=PreprocessConfig.of(Squash(tile=tile, resample=processor.resample), processor),
    )


def plan(config: ImageFacts) -> WeightPlan:
    """Checkpoint names -> `VisionEncoderModel`."""
    zero_shot = "the zero-shot scores' scale and bias, which features do not need"
    others = (Elsewhere("text_model."), Ignore("logit_scale", zero_shot), Ignore("logit_bias", zero_shot))
    return tower_plan(config.vision).under("", "tower.") + WeightPlan(others)


FAMILY = TowerFamily(
    name="siglip", known_as=MODEL_TYPES, matches=matches, read_config=read_config, plan=plan
)  # fmt: skip
