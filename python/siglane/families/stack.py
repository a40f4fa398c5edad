"""From patches of many images to rows of the language model's width: one packed tower call, then the projector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

from siglane.config.images import ImageFacts
from siglane.config.preprocess import PreprocessConfig
from siglane.config.vision import VisionConfig
from siglane.image.patchify import normalisation
from siglane.nn.device import host_memory
from siglane.nn.parallel import TensorParallel
from siglane.projector.assemble import assemble, projector_input
from siglane.projector.build import build_projector
from siglane.projector.visual_vocabulary import VisualVocabulary
from siglane.types import BackendChoice, ImagePatches, ImagePlaceholder, ImageTokens, Indicator, PackedPatches
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

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Moves and casts as every module does; the normalisation only moves."""
        scale, shift = self.pixel_scale, self.pixel_shift
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.pixel_scale, self.pixel_shift = scale.to(self.pixel_scale.device), shift.to(self.pixel_shift.device)
        return self

    @property
    def device(self) -> torch.device:
        return self.tower.patch_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.tower.patch_embedding.weight.dtype

    def pack(self, images: Sequence[ImagePatches]) -> PackedPatches:
        """The patches of all images in one tensor on the module's device, normalised in float32, in its dtype."""
        wide = _joined([image.pixels for image in images], self.device).to(self.device, non_blocking=True).float()
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


def _joined(pixels: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """All patches in one tensor of the host, 8-bit as long as every image's are. device: to which it will be copied."""
    if len(pixels) == 1 and device.type == "cpu":
        return pixels[0]
    if len({one.dtype for one in pixels}) > 1:
        pixels = [one.float() for one in pixels]
    joined = host_memory((sum(map(len, pixels)), pixels[0].shape[1]), pixels[0].dtype, device)
    return torch.cat(list(pixels), out=joined)


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One image behind the tower.

    features: `[patches, hidden_size]`, tile after tile, raster order inside a tile; projector_input: what a projector
    reads, `[patches, channels]`, the features themselves unless scales are merged: then `channels` is hidden_size times
    their number and the tiles are those of the last one; rows: `[layout.image_tokens, output_size]` of the projector,
    None where it was not asked.
    """

    features: torch.Tensor
    projector_input: torch.Tensor
    rows: torch.Tensor | None


class VisionStack(nn.Module):
    """Encoder and projector of a vision-language model; it knows no host and no language model."""

    def __init__(
        self, facts: ImageFacts, tp: TensorParallel | None = None, attention_backend: BackendChoice = "auto"
    ) -> None:
        super().__init__()
        self.encoder = VisionEncoderModel(facts.vision, facts.preprocess, tp, attention_backend)
        self.projector = build_projector(facts.projector, tp)
        self.newline = nn.Parameter(torch.empty(facts.projector.output_size)) if facts.newline else None

    def encode(
        self, images: Sequence[ImagePatches], taps: Taps | None = None, *, project: bool = True
    ) -> tuple[Encoded, ...]:
        """Each image through the tower and, with `project`, the projector; all of them in one packed call.

        RuntimeError when the projector gives another number of rows than a layout says. taps, when given, receives the
        tower's intermediates, `projector_input` and `projected`.
        """
        if not images:
            return ()
        features = self.encoder.features(images, taps)
        read = [projector_input(rows, image.layout) for rows, image in zip(features, images, strict=True)]
        if taps is not None:
            taps["projector_input"] = torch.cat(read)
        if not project:
            return tuple(Encoded(*pair, None) for pair in zip(features, read, strict=True))
        rows = self.projector(torch.cat(read), [grid for image in images for grid in image.layout.projector_grids])
        parts = rows.split([sum(grid.area for grid in image.layout.projected) for image in images])
        projected = [assemble(part, image.layout, self.newline) for part, image in zip(parts, images, strict=True)]
        if taps is not None:
            taps["projected"] = torch.cat(projected)
        return tuple(map(Encoded, features, read, projected))

    def forward(self, images: Sequence[ImagePatches], taps: Taps | None = None) -> ImageTokens:
        """Rows `[T, output_size]` of all images, for each as many as its prompt has places (`layout.rows`)."""
        if not images:
            encoder, width = self.encoder, self.projector.config.output_size
            return ImageTokens(torch.empty(0, width, dtype=encoder.dtype, device=encoder.device), ())
        rows = [self._with_indicators(*pair) for pair in zip(self.encode(images, taps), images, strict=True)]
        return ImageTokens(torch.cat(rows), tuple(image.layout.rows for image in images))

    def _with_indicators(self, encoded: Encoded, image: ImagePatches) -> torch.Tensor:
        """The projector's rows with the visual vocabulary's learned ones where the layout has them."""
        rows = encoded.rows
        assert rows is not None
        layout = image.layout
        if layout.rows == layout.image_tokens:
            return rows
        if not isinstance(self.projector, VisualVocabulary):
            raise ValueError("the layout has indicators, the model has no visual vocabulary")
        pieces, start = [], 0
        for piece in layout.pieces:
            if isinstance(piece, ImagePlaceholder):
                pieces.append(rows[start : start + piece.rows])
                start += piece.rows
            elif isinstance(piece, Indicator):
                pieces.append(self.projector.indicator(piece.index)[None])
        return torch.cat(pieces)
