"""The vision half alone: features and projected rows of many images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from siglane.config.preprocess import LOCAL_DECODE, DecodeConfig
from siglane.engine.limits import STEP_PATCHES
from siglane.engine.process.load import placement
from siglane.errors import UserError
from siglane.families.ahead import ahead
from siglane.families.model import load_vision
from siglane.families.pipeline import MediaPipeline, several
from siglane.families.stack import Encoded, VisionStack
from siglane.media.item import ImageSource
from siglane.media.messages import image_item, video_item
from siglane.media.policy import LOCAL_MEDIA, MediaPolicy
from siglane.nn.cpu.optimise import optimise
from siglane.settings.engine import Dtype, EngineConfig
from siglane.tiling.rule import CHECKPOINT_LIMITS, ImageBudget
from siglane.types import BackendChoice, ImagePatches
from siglane.vision.packed import encode_packed
from siglane.weights.demo import opened
from siglane.weights.hub import Checkpoint

EncoderSource = ImageSource | Mapping[str, Any]


class VisionEncoder:
    """The vision half of a model: a plain SigLIP tower, or tower and projector of a vision-language model.

    Images are packed together up to `max_batch_patches` patches (0: what suits the device; a larger one runs alone), or
    not at all without `enable_packing`, and each is laid out as if alone in its request. Features do not depend on what
    they are packed with. adapter, verify_weights: as of `LLM`; max_seq_len: an older name of max_batch_patches; budget:
    the limits of images that name none of their own.
    """

    def __init__(
        self,
        model: str | Path | Checkpoint,
        *,
        revision: str | None = None,
        adapter: str | Path | None = None,
        verify_weights: bool | None = None,
        device: str = "auto",
        dtype: Dtype = "auto",
        attention_backend: BackendChoice = "auto",
        max_batch_patches: int = 0,
        max_seq_len: int = 0,
        enable_packing: bool = True,
        media: MediaPolicy = LOCAL_MEDIA,
        decode: DecodeConfig = LOCAL_DECODE,
        budget: ImageBudget = CHECKPOINT_LIMITS,
    ) -> None:
        max_batch_patches = max_batch_patches or max_seq_len
        config = EngineConfig(
            device=device, vision_dtype=dtype, attention_backend=attention_backend, max_batch_patches=max_batch_patches
        )
        on, _, vision_dtype = placement(config)
        checkpoint = opened(model, revision, adapter=adapter, verify_weights=verify_weights)
        self._model, processor = load_vision(
            checkpoint, device=on, dtype=vision_dtype, attention_backend=attention_backend
        )
        self._encoder = self._model.encoder if isinstance(self._model, VisionStack) else self._model
        optimise(self._model)
        # without packing the second image is always one too many
        self._max_batch_patches = (max_batch_patches or STEP_PATCHES[on.type]) if enable_packing else 0
        self._media = MediaPipeline(processor.facts, budget, media, decode)

    def encode(self, images: Iterable[EncoderSource]) -> list[torch.Tensor]:
        """Features of each image, `[patches, hidden_size]`, tile after tile, in raster order inside a tile.

        images: sources, or `{"image": source}` and `{"video": source}` with a budget as in `LLM.generate`.
        For a plain SigLIP checkpoint the reference's `last_hidden_state`, for a vision-language model what its
        projector reads. UserError for the first image that cannot be used.
        """
        return [encoded.projector_input for encoded in self.run(images, project=False)]

    @torch.inference_mode()
    def encode_packed(
        self, hidden_states: torch.Tensor, grid_thw: torch.Tensor | Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Normalised patches `[total_patches, patch_dim]` of many pictures -> tower features `[total_patches,
        hidden_size]`, in one forward whatever their number (`siglane.vision.packed`, which also makes the patches)."""
        return encode_packed(self._encoder.tower, hidden_states, grid_thw)

    def project(self, images: Iterable[EncoderSource]) -> list[torch.Tensor]:
        """What the language model reads of each image, `[rows, llm_hidden]`. UserError when there is no projector."""
        if not isinstance(self._model, VisionStack):
            raise UserError("a plain SigLIP checkpoint has no projector; use encode", code="no_projector")
        return [encoded.rows for encoded in self.run(images) if encoded.rows is not None]

    def run(self, images: Iterable[EncoderSource], *, project: bool = True) -> Iterator[Encoded]:
        """Encodes and, where there is a projector, projects each image, in order and as the images come. UserError for
        the first image that cannot be used."""
        for encoded in self.stream(images, project=project):
            if isinstance(encoded, UserError):
                raise encoded
            yield encoded

    def stream(self, images: Iterable[EncoderSource], *, project: bool = True) -> Iterator[Encoded | UserError]:
        """`run` that goes on behind an image that cannot be used: its error stands in its place."""
        group: list[ImagePatches] = []
        for prepared in ahead(self._prepare, several(images)):
            if isinstance(prepared, UserError):
                yield from self._encode(group, project)
                group = []
                yield prepared
                continue
            if group and sum(image.layout.patches for image in (*group, prepared)) > self._max_batch_patches:
                yield from self._encode(group, project)
                group = []
            group.append(prepared)
        yield from self._encode(group, project)

    def _prepare(self, numbered: tuple[int, EncoderSource]) -> ImagePatches | UserError:
        try:
            return self._patches(*numbered)
        except UserError as error:
            return error

    def _patches(self, number: int, given: EncoderSource) -> ImagePatches:
        video = isinstance(given, Mapping) and "video" in given
        item = video_item(given, f"images[{number}]") if video else image_item(given, f"images[{number}]")
        self._media.prepare([item])
        return item.patches

    @torch.inference_mode()
    def _encode(self, group: Sequence[ImagePatches], project: bool) -> Sequence[Encoded]:
        if isinstance(self._model, VisionStack):
            return self._model.encode(group, project=project)
        return [Encoded(features, features, None) for features in self._model.features(group)]
