"""Plain SigLIP checkpoints: the tower on its own, as `siglane encode` runs it (formats.md section 1).

Features are the reference's `last_hidden_state`: every block, then post_layernorm. SigLIP2 of fixed resolution is the
same model; NaFlex is not.
"""

from __future__ import annotations

from siglane.config.images import ImageFacts
from siglane.config.preprocess import ImageProcessorConfig, PreprocessConfig
from siglane.config.projector import vila_projector
from siglane.config.reader import ConfigReader, RawConfig
from siglane.config.vision import VisionConfig
from siglane.errors import ConfigError
from siglane.families.family import TowerFamily
from siglane.families.stated import PREPROCESSOR, image_processor
from siglane.nn.plan import Elsewhere, Ignore, WeightPlan
from siglane.tiling.squash import Squash
from siglane.vision.tower import tower_plan
from siglane.weights.hub import Checkpoint


class Siglip(TowerFamily):
    """known_as: the `model_type` of a checkpoint with a text tower beside the vision tower, and of one without."""

    name = "siglip"
    known_as = ("siglip", "siglip_vision_model")

    def matches(self, root: RawConfig, checkpoint: Checkpoint) -> bool:
        return root.get("model_type") in self.known_as

    def images(self, checkpoint: Checkpoint, *, head: bool = False) -> ImageFacts:
        root = checkpoint.reader()
        reader = root.section("vision_config") if root.value("model_type", str) == self.known_as[0] else root
        vision = VisionConfig.from_hf(reader.raw, feature_layer=-1, post_norm=True, head=head, name=reader.name)
        vision, preprocess = self.pictures(checkpoint, reader, vision)
        return ImageFacts(
            vision=vision,
            projector=vila_projector("identity", input_size=vision.hidden_size, output_size=vision.hidden_size),
            preprocess=preprocess,
            newline=False,
            video=None,
        )

    def pictures(
        self, checkpoint: Checkpoint, reader: ConfigReader, vision: VisionConfig
    ) -> tuple[VisionConfig, PreprocessConfig]:
        """The tower with its positions, and how pictures come to it. reader: the tower's configuration."""
        side = reader.size("image_size", 224)
        file = image_processor(checkpoint) or ConfigReader({"size": {"height": side, "width": side}}, PREPROCESSOR)
        processor = ImageProcessorConfig.from_hf(file.raw, name=file.name)
        tile, grid = processor.size, vision.position_grid
        if (tile.height // vision.patch_size, tile.width // vision.patch_size) != grid:
            raise ConfigError(
                f"{file.name}: {tile.width}x{tile.height} pixels do not hold the tower's {grid.h}x{grid.w} patches"
            )
        return vision, PreprocessConfig.of(Squash(tile=tile, resample=processor.resample), processor)

    def plan(self, images: ImageFacts) -> WeightPlan:
        zero_shot = "the zero-shot scores' scale and bias, which features do not need"
        others = (Elsewhere("text_model."), Ignore("logit_scale", zero_shot), Ignore("logit_bias", zero_shot))
        return tower_plan(images.vision).under("", "tower.") + WeightPlan(others)
