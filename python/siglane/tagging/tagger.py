"""`Tagger`: images and labels -> tags, by SigLIP's two towers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from siglane.config.preprocess import LOCAL_DECODE, DecodeConfig
from siglane.config.two_tower import TextRule
from siglane.errors import ConfigError, ImageError, UserError
from siglane.families.ahead import PREPARE_AHEAD, ahead
from siglane.families.pipeline import MediaPipeline, several
from siglane.families.registry import image_facts
from siglane.families.two_tower import TEXTS_PER_FORWARD, load_two_tower
from siglane.media.item import ImageSource
from siglane.media.messages import image_item
from siglane.media.policy import LOCAL_MEDIA, MediaPolicy
from siglane.nn.attention import runnable_backends
from siglane.nn.cpu.optimise import optimise
from siglane.nn.device import resolve_device, resolve_dtype
from siglane.settings.engine import Dtype, Quantization
from siglane.settings.options import one_of
from siglane.settings.tagging import CONFIDENCE_THRESHOLD, MAX_TAGS, TEMPLATES, Attention, TagSettings, check_limits
from siglane.tagging.cache import LabelCache, default_folder, state_of
from siglane.tagging.labels import check_labels, check_templates, texts_of, warn_of_losses
from siglane.tagging.scoring import label_vectors, likeliest, sigmoid_scores
from siglane.tiling.naflex import NaFlex
from siglane.tiling.rule import ImageBudget
from siglane.types import BackendChoice, ImagePatches
from siglane.weights.demo import open_model, opened
from siglane.weights.hub import Checkpoint

logger = logging.getLogger(__name__)

TaggedSource = ImageSource | Mapping[str, Any]

BATCH_SIZES = {"cpu": 8, "cuda": 32}
NOT_FINITE = UserError("the model gives no finite numbers for this picture; use another dtype", code="not_finite")
MANY_TEXTS = 1000  # so many take long enough for a progress bar

# names of transformers' attn_implementation -> what computes the same here
BACKENDS: dict[Attention, BackendChoice] = {
    "auto": "auto",
    "sdpa": "sdpa",
    "eager": "eager",
    "flash_attention_2": "flash_attn",
}


class Tag(NamedTuple):
    """confidence: 0..1, how likely label and image belong together; the confidences of an image have no sum."""

    label: str
    confidence: float


@dataclass(frozen=True, slots=True)
class Tagged:
    """One image. tags: the most likely first; error: why it could not be read, None when it could; code: of the error,
    as in `UserError`."""

    tags: tuple[Tag, ...] = ()
    error: str | None = None
    code: str | None = None

    def as_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {"tags": [tag._asdict() for tag in self.tags]}
        return row if self.error is None else row | {"error": self.error}


class _Batch(NamedTuple):
    """errors: of each image, None for one that could be read; embeddings: `[those that could, D]`."""

    errors: list[UserError | None]
    embeddings: torch.Tensor


class Tagger:
    """A SigLIP or SigLIP2 with both towers.

    model: a folder or a hub id; adapter, verify_weights: as of `LLM`; batch_size: images of one packed forward, 0 for
    what suits the device; max_num_patches: of a NaFlex model's images that name none of their own, None for what the
    checkpoint says; templates: texts with `{label}`, a label's embedding is the mean of theirs; cache: folder of label
    matrices, None for `~/.cache/siglane/labels`. Raises UserError for a model or a setting that cannot be used here.

    Images are what `LLM` takes, or `{"image": source, "max_num_patches": 512}` with a budget of their own.
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
        quantization: Quantization = "none",
        attention: Attention = "auto",
        batch_size: int = 0,
        max_num_patches: int | None = None,
        templates: Sequence[str] = TEMPLATES,
        cache: str | Path | None = None,
        media: MediaPolicy = LOCAL_MEDIA,
        decode: DecodeConfig = LOCAL_DECODE,
    ) -> None:
        self.templates = check_templates(templates)
        if batch_size < 0:
            raise ConfigError(f"batch_size must not be negative, got {batch_size}")
        on = resolve_device(device)
        chosen = resolve_dtype(dtype, on)
        backend = _backend(attention, on, chosen)
        checkpoint = opened(model, revision, adapter=adapter, verify_weights=verify_weights)
        bits = None if quantization == "none" else quantization
        loaded = load_two_tower(checkpoint, device=on, dtype=chosen, attention_backend=backend, quantization=bits)
        self._model = loaded.model
        optimise(self._model)
        self._tokens = loaded.texts
        self._media = MediaPipeline(loaded.images.facts, ImageBudget(max_num_patches=max_num_patches), media, decode)
        self._batch_size = batch_size or BATCH_SIZES[on.type]
        self._texts = TEXTS_PER_FORWARD[on.type]
        folder = default_folder() if cache is None else Path(cache).expanduser()
        self._cache = LabelCache(folder, state_of(checkpoint, str(chosen), quantization, repr(self.text_rule)))
        self.summary = f"{on}, {chosen}, {self._batch_size} pictures a batch; texts: {self.text_rule}"
        logger.info("tagging on %s", self.summary)

    @classmethod
    def from_settings(cls, settings: TagSettings, **options: Any) -> Tagger:
        """options: of the constructor, for what the settings do not say. UserError when they switch tagging off."""
        model = settings.required_model()
        named = {name: options.pop(name, None) for name in ("revision", "adapter", "verify_weights")}
        checkpoint = open_model(model, **named)
        return cls(
            checkpoint,
            device=settings.device,
            dtype=settings.dtype,
            quantization=settings.quantization,
            attention=settings.attention,
            batch_size=settings.batch_size,
            max_num_patches=_patches_of(checkpoint, settings.max_num_patches),
            **options,
        )

    @property
    def text_rule(self) -> TextRule:
        """How texts are prepared, cut and padded."""
        return self._tokens.rule

    def tag(
        self,
        images: Iterable[TaggedSource],
        labels: Sequence[str],
        *,
        threshold: float = CONFIDENCE_THRESHOLD,
        max_tags: int = MAX_TAGS,
        top_k: int | None = None,
    ) -> list[Tagged]:
        """For each image at most `max_tags` labels of at least `threshold`, the most likely first, among equals the
        first of `labels`. top_k: so many labels instead, whatever their confidence.

        An image that cannot be read has an `error`; UserError for labels or limits that cannot be used.
        """
        return list(self.stream(images, labels, threshold=threshold, max_tags=max_tags, top_k=top_k))

    def stream(
        self,
        images: Iterable[TaggedSource],
        labels: Sequence[str],
        *,
        threshold: float = CONFIDENCE_THRESHOLD,
        max_tags: int = MAX_TAGS,
        top_k: int | None = None,
    ) -> Iterator[Tagged]:
        """`tag` as the images come: any iterable, of which a bounded number is read ahead."""
        check_limits(threshold, max_tags)
        if top_k is not None and top_k < 1:
            raise ConfigError(f"top_k must be at least 1, got {top_k}")
        names = check_labels(labels)
        matrix = self._matrix(names)
        least, most = (threshold, max_tags) if top_k is None else (0.0, top_k)
        return chain.from_iterable(
            _tagged(batch, self._scores(batch, matrix), names, least, most) for batch in self._batches(images)
        )

    def scores(self, images: Iterable[TaggedSource], labels: Sequence[str]) -> torch.Tensor:
        """Sigmoid probabilities, f32 `[images, labels]`. UserError for the first image that cannot be read."""
        matrix = self._matrix(check_labels(labels))
        rows = [self._scores(batch, matrix) for batch in map(_readable, self._batches(images))]
        return torch.cat([torch.zeros(0, len(matrix)), *rows])

    def embed_images(self, images: Iterable[TaggedSource]) -> torch.Tensor:
        """f32 `[images, D]`, unit length. UserError for the first image that cannot be read."""
        rows = [batch.embeddings.cpu() for batch in map(_readable, self._batches(images))]
        return torch.cat([torch.zeros(0, self._model.config.text.projection_size), *rows])

    def stream_embeddings(self, images: Iterable[TaggedSource]) -> Iterator[torch.Tensor | UserError]:
        """For each image its unit vector, f32 `[D]`, or why it has none; as they come, a bounded number ahead."""
        for batch in self._batches(images):
            vectors = iter(batch.embeddings.cpu())
            for error in batch.errors:
                found = next(vectors) if error is None else error
                broken = isinstance(found, torch.Tensor) and not found.isfinite().all()
                yield NOT_FINITE if broken else found

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """f32 `[texts, D]`, unit length: of the texts themselves, without a template. Equal texts are read once."""
        if not texts:
            return torch.zeros(0, self._model.config.text.projection_size)
        ids, places = torch.unique(self._tokens.ids(texts), dim=0, return_inverse=True)
        quiet = None if len(ids) >= MANY_TEXTS else True  # None: where nobody looks
        with torch.inference_mode():
            parts = tqdm(ids.split(self._texts), desc="labels", leave=False, disable=quiet)
            rows = [self._model.embed_texts(part).cpu() for part in parts]
        return torch.cat(rows)[places]

    def _matrix(self, labels: tuple[str, ...]) -> torch.Tensor:
        """f32 `[labels, D]`, unit length, on the device."""
        warn_of_losses(labels, self.templates, self._tokens)
        matrix = self._cache.get(self.templates, labels, lambda: self._embed_labels(labels))
        return matrix.to(self._model.logit_scale.device)

    def _embed_labels(self, labels: Sequence[str]) -> torch.Tensor:
        return label_vectors(self.embed_texts(texts_of(template, labels)) for template in self.templates)

    @torch.inference_mode()
    def _scores(self, batch: _Batch, matrix: torch.Tensor) -> torch.Tensor:
        """f32 `[readable images, labels]`, on the host."""
        return sigmoid_scores(batch.embeddings, matrix, self._model.calibration).cpu()

    def _batches(self, images: Iterable[TaggedSource]) -> Iterator[_Batch]:
        """The readable images of a batch share one packed forward; the next ones are prepared meanwhile."""
        prepared = ahead(self._prepare, several(images), max(PREPARE_AHEAD, 2 * self._batch_size))
        while group := list(islice(prepared, self._batch_size)):
            patches = [one for one in group if isinstance(one, ImagePatches)]
            yield _Batch([one if isinstance(one, UserError) else None for one in group], self._embed(patches))

    def _prepare(self, numbered: tuple[int, TaggedSource]) -> ImagePatches | UserError:
        number, given = numbered
        try:
            item = image_item(given, f"images[{number}]")
            self._media.prepare([item])
            return item.patches
        except UserError as error:
            return error
        except OSError as error:  # a disk that fails while it is read
            return ImageError(f"images[{number}] cannot be read: {error.strerror}", code="image_not_found")

    @torch.inference_mode()
    def _embed(self, patches: Sequence[ImagePatches]) -> torch.Tensor:
        if not patches:
            return torch.zeros(0, self._model.config.text.projection_size, device=self._model.logit_scale.device)
        return self._model.embed_images(patches)


def _tagged(
    batch: _Batch, scores: torch.Tensor, labels: Sequence[str], threshold: float, most: int
) -> Iterator[Tagged]:
    undefined = scores.isnan().any(dim=1).tolist()
    rows = zip(undefined, likeliest(scores, most, threshold), strict=True)
    for error in batch.errors:
        if error is not None:
            yield Tagged(error=error.message, code=error.code)
            continue
        broken, found = next(rows)
        if broken:
            yield Tagged(error=NOT_FINITE.message, code=NOT_FINITE.code)
        else:
            yield Tagged(tuple(Tag(labels[number], score) for number, score in found))


def _readable(batch: _Batch) -> _Batch:
    for error in batch.errors:
        if error is not None:
            raise error
    return batch


def _patches_of(checkpoint: Checkpoint, patches: int | None) -> int | None:
    """The setting, for a model that has a use for it; the images of others have one size."""
    if patches is None or isinstance(image_facts(checkpoint).preprocess.rule, NaFlex):
        return patches
    logger.warning("max_num_patches %d does not apply to this model; its pictures have one size", patches)
    return None


def _backend(attention: Attention, device: torch.device, dtype: torch.dtype) -> BackendChoice:
    one_of("attention", attention, BACKENDS)
    try:
        runnable_backends(BACKENDS[attention], device, dtype)
    except ConfigError as error:
        message = (
            f"attention {attention!r} cannot run on {device} in {dtype}: it needs the package flash-attn, a GPU of "
            "Ampere or newer and bfloat16 or float16; use 'auto'"
        )
        raise ConfigError(message) from error
    return BACKENDS[attention]
