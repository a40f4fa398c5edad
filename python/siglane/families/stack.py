"""From patches of many images to rows of the language model's width: one packed tower call, then the projector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from siglane.config.preprocess import PreprocessConfig
from siglane.config.tokens import projected_grid
from siglane.config.vision import VisionConfig
from siglane.config.vlm import VlmConfig
from siglane.image.patchify import normalisation
from siglane.nn.parallel import TensorParallel
from siglane.projector.mlp import Projector
from siglane.types import BackendChoice, Grid, ImageLayout, ImagePatches, ImageTokens, PackedPatches
from siglane.vision.tower import SiglipVisionModel, Taps


class VisionEncoderModel(nn.Module):
    """A tower that takes images as they leave the host: packs, normalises, encodes, and hands each its features."""

    pixel_scale: torch.Tensor
    pixel_shift: torch.Tensor

    def __init__(
        self,
        vision: VisionConfig,
        preprocess: PreprocessConfig,
        tp: TensorParallel | None = None,
        attention_backend: BackendChoice = "auto",
    ) -> None:
        super().__init__()
        self.preprocess = preprocess
        self.tower = SiglipVisionModel(vision, tp, attention_backend)
        # real values even when the model is built on the meta device, and float32 whatever the parameters are:
        # 1 / 255 in bfloat16 is wrong by more than a grey level
        with torch.device("cpu"):
            scale, shift = normalisation(preprocess, vision)
        self.register_buffer("pixel_scale", scale, persistent=False)
        self.register_buffer("pixel_shift", shift, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.tower.patch_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.tower.patch_embedding.weight.dtype

    def pack(self, images: Sequence[ImagePatches]) -> PackedPatches:
        """The patches of all images in one tensor on the module's device, normalised in float32, in its dtype."""
        pixels = images[0].pixels if len(images) == 1 else torch.cat([image.pixels for image in images])
        wide = pixels.to(self.device, non_blocking=True).float()
        scale, shift = self.pixel_scale.to(self.device), self.pixel_shift.to(self.device)
        normalised = torch.addcmul(shift, wide, scale).to(self.dtype)
        return PackedPatches(normalised, tuple(grid for image in images for grid in image.layout.grids))

    def features(self, images: Sequence[ImagePatches], taps: Taps | None = None) -> tuple[torch.Tensor, ...]:
        """Per image `[patches, hidden_size]`, tile after tile, raster order inside a tile. One tower call for all.

        taps, when given, receives the tower's intermediates.
        """
        if not images:
            return ()
        features: torch.Tensor = self.tower(self.pack(images), taps)
        return torch.split(features, [image.layout.patches for image in images])

    def embeddings(self, images: Sequence[ImagePatches]) -> torch.Tensor:
        """One vector per tile, `[tiles of all images, hidden_size]`, from the MAP head. ValueError without a head."""
        packed = self.pack(images)
        return self.tower.pool(self.tower(packed), packed.grids)


class VisionStack(VisionEncoderModel):
    """Tower and projector of a vision-language model; it knows no host and no language model.

    `features` gives what the projector reads, `forward` what the language model reads.
    """

    def __init__(
        self, config: VlmConfig, tp: TensorParallel | None = None, attention_backend: BackendChoice = "auto"
    ) -> None:
        super().__init__(config.vision, config.preprocess, tp, attention_backend)
        self.projector = Projector(config.projector, tp)

    @property
    def merges_scales(self) -> bool:
        return self.preprocess.tiling == "dynamic_s2"

    def features(self, images: Sequence[ImagePatches], taps: Taps | None = None) -> tuple[torch.Tensor, ...]:
        """Per image `[patches, channels]`, tile after tile in the order the projector sees them, raster inside.

        With dynamic_s2 the scales are merged: `channels` is hidden_size times their number and the tiles are those of
        the last scale. taps, when given, also receives `merged`.
        """
        features = super().features(images, taps)
        if not self.merges_scales or not images:
            return features
        scales = self.preprocess.s2_scales
        features = tuple(merge_scales(rows, image.layout, scales) for rows, image in zip(features, images, strict=True))
        if taps is not None:
            taps["merged"] = torch.cat(features)
        return features

    def forward(self, images: Sequence[ImagePatches], taps: Taps | None = None) -> ImageTokens:
        """Rows `[T, output_size]` of all images, as many for each as its layout says.

        taps, when given, receives the tower's intermediates, `merged` (dynamic_s2) and `projected`. RuntimeError when
        an image gets another number of rows than its layout says; nothing is ever cut or filled up.
        """
        config = self.projector.config
        if not images:
            return ImageTokens(torch.empty(0, config.output_size, dtype=self.dtype, device=self.device), ())
        grids = [self._projector_grids(image.layout) for image in images]
        rows = self.projector(torch.cat(self.features(images, taps)), [grid for group in grids for grid in group])
        lengths = tuple(sum(projected_grid(grid, config).area for grid in group) for group in grids)
        expected = tuple(image.layout.image_tokens for image in images)
        if lengths != expected or rows.shape[0] != sum(lengths):
            raise RuntimeError(
                f"the projector gave {lengths} rows ({rows.shape[0]} in all), the layouts say {expected}"
            )
        if self.merges_scales:
            pieces = zip(torch.split(rows, list(lengths)), images, grids, strict=True)
            stitched = [
                _map(piece, image.layout.arrangement, projected_grid(group[0], config))
                for piece, image, group in pieces
            ]
            rows = torch.cat([whole.flatten(0, 1) for whole in stitched])
        if taps is not None:
            taps["projected"] = rows
        return ImageTokens(rows, lengths)

    def _projector_grids(self, layout: ImageLayout) -> tuple[Grid, ...]:
        """The grids of the tiles that the projector sees; dynamic_s2's are those of the last scale."""
        return layout.grids[-layout.arrangement.area :] if self.merges_scales else layout.grids


def merge_scales(features: torch.Tensor, layout: ImageLayout, scales: Sequence[int]) -> torch.Tensor:
    """dynamic_s2: the tiles of all scales `[patches, c]` -> tiles of the last scale `[tiles * h * w, scales * c]`.

    Every scale's tiles are stitched into one map, brought to the last scale's size by area interpolation in float32,
    joined on the channel axis from small to large and cut into tiles again. An image of one tile repeats its channels
    (VILA llava_arch.py `merge_features_for_dynamic_s2`).
    """
    if len(layout.tiles) == 1:
        return features.repeat(1, len(scales))
    last, grid = layout.arrangement, layout.tiles[0].grid
    arrangements = [*(Grid(scale // scales[0], scale // scales[0]) for scale in scales[:-1]), last]
    groups = torch.split(features, [arrangement.area * grid.area for arrangement in arrangements])
    size = (last.h * grid.h, last.w * grid.w)
    maps = [
        F.interpolate(_map(rows, arrangement, grid).permute(2, 0, 1)[None].float(), size=size, mode="area")
        for rows, arrangement in zip(groups, arrangements, strict=True)
    ]
    merged = torch.cat(maps, dim=1)[0].permute(1, 2, 0).to(features.dtype)
    tiles = merged.unflatten(1, (last.w, grid.w)).unflatten(0, (last.h, grid.h))
    return tiles.transpose(1, 2).flatten(0, 3)


def _map(rows: torch.Tensor, arrangement: Grid, grid: Grid) -> torch.Tensor:
    """`[tiles * h * w, c]`, tile after tile -> one map `[rows of tiles * h, columns of tiles * w, c]`."""
    tiles = rows.unflatten(0, (*arrangement, *grid))
    return tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)
