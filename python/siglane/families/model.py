"""From a checkpoint to modules that are ready to run."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from siglane.config.images import ImageFacts
from siglane.config.vlm import VlmConfig
from siglane.errors import ConfigError, WeightError
from siglane.families.codes import OWN_HEAD, CodesReader
from siglane.families.processor import ImageProcessor, load_processor
from siglane.families.quantise import Quantiser
from siglane.families.registry import is_vision_only, tower_family, unknown, vlm_family
from siglane.families.stack import VisionEncoderModel, VisionStack
from siglane.families.stated import log_contradictions
from siglane.families.weights import ModelWeights, model_sources, model_weights, tower_weights
from siglane.lm.build import build_language_model
from siglane.lm.quantise import separate
from siglane.nn.parallel import TensorParallel
from siglane.nn.plan import WeightPlan
from siglane.nn.quantise import Bits
from siglane.types import BackendChoice, ImagePatches, ImageTokens
from siglane.vision.tower import Taps
from siglane.weights.checksum import check_files
from siglane.weights.hub import ADAPTER_WEIGHTS, Checkpoint, Source
from siglane.weights.load import NO_STAGES, QUANTISED, Stage, StoredTensor, allocate, fill, rehearse, stored_tensors
from siglane.weights.merge import adapters_of
from siglane.weights.quantised import CodesFile, CodesFormat, agreed_format, codes_format

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)


class VisionLanguageModel(nn.Module):
    """The two halves of a model; `splice` joins them. vision: None for a model without eyes."""

    def __init__(
        self, config: VlmConfig, tp: TensorParallel | None = None, attention_backend: BackendChoice = "auto"
    ) -> None:
        super().__init__()
        self.config = config
        self.vision = None if config.images is None else VisionStack(config.images, tp, attention_backend)
        self.language = build_language_model(config.language, tp)

    def see(self, images: Sequence[ImagePatches], taps: Taps | None = None) -> ImageTokens:
        """`VisionStack.forward`. ValueError for a model without eyes."""
        if self.vision is None:
            raise ValueError("this model has no eyes")
        tokens: ImageTokens = self.vision(images, taps)
        return tokens


def load_model(
    checkpoint: Checkpoint,
    config: VlmConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    vision_dtype: torch.dtype | None = None,
    tp: TensorParallel | None = None,
    attention_backend: BackendChoice = "auto",
    quantization: Bits | None = None,
) -> VisionLanguageModel:
    """The whole model on `device` in eval mode, without gradients.

    dtype: of the language model, and of tower and projector unless `vision_dtype` says otherwise. quantization: bits of
    the linear layers' weights; on CPUs no two blocks are whole in memory at a time. None: as the files have them, which
    in a folder of codes are fewer. ConfigError or WeightError, before anything is allocated, when configuration and
    tensors do not belong together; UserError for bits that have no kernel here.
    """
    if (stated := codes_format(checkpoint)) is not None:
        agreed_format(checkpoint, stated, quantization, torch.device(device), 1 if tp is None else tp.size)
        return _read_codes(checkpoint, stated, config, dtype, vision_dtype or dtype, attention_backend)
    model, weights = _rehearsed_whole(checkpoint, config, tp, attention_backend)
    device, vision_dtype = torch.device(device), vision_dtype or dtype
    quantiser = None
    if quantization is not None:
        quantiser = Quantiser(quantization, model.vision, model.language, device, dtype, vision_dtype)
    later = quantiser.later if quantiser else []
    if model.vision is not None:
        allocate(model.vision, device, vision_dtype, later)
    allocate(model.language, device, dtype, later)
    filled = _filled(model, weights.plan, weights.tensors, quantiser.stages if quantiser else NO_STAGES)
    if quantiser is not None:
        quantiser.finish()
    return filled


def _read_codes(
    checkpoint: Checkpoint,
    stated: CodesFormat,
    config: VlmConfig,
    dtype: torch.dtype,
    vision_dtype: torch.dtype,
    attention_backend: BackendChoice,
) -> VisionLanguageModel:
    """`load_model` of a folder of codes."""
    file, model = _rehearsed_codes(checkpoint, config, attention_backend)
    reader = CodesReader(file, model, stated)
    check_files(checkpoint, [file.path])
    reader.language(model.language, stated.bits, dtype)
    if model.vision is not None:
        reader.encoders(model.vision, "8bit", vision_dtype)  # as `Quantiser` has it
    return model.eval().requires_grad_(False)


def model_tensors(checkpoint: Checkpoint) -> tuple[StoredTensor, ...]:
    """All tensors of a vision-language checkpoint, known by their files' headers. WeightError as `stored_tensors`."""
    return stored_tensors(model_sources(checkpoint))


def model_files(checkpoint: Checkpoint) -> tuple[Path, ...]:
    """The files that hold the tensors of any checkpoint, those of its adapters among them. WeightError as
    `stored_tensors`."""
    if codes_format(checkpoint) is not None:
        return (CodesFile(checkpoint).path,)
    plain = is_vision_only(checkpoint)
    sources = (Source(checkpoint),) if plain else model_sources(checkpoint)
    adapters = (adapter.root / ADAPTER_WEIGHTS for adapter in adapters_of(checkpoint, sources))
    return tuple(dict.fromkeys((*(tensor.file for tensor in stored_tensors(sources)), *adapters)))


def check_tower(checkpoint: Checkpoint) -> None:
    """`check_model` for a plain SigLIP tower."""
    family = tower_family(checkpoint)
    if family is None:
        raise unknown(checkpoint)
    facts = family.images(checkpoint, head=True)
    _rehearsed_tower(checkpoint, facts, family.plan(facts))


def check_model(checkpoint: Checkpoint, config: VlmConfig) -> ModelWeights:
    """Compares the names and shapes of all tensors with the configuration; allocates nothing.

    ConfigError or WeightError as `load_model`, for a host that fills the language model by itself.
    """
    return _rehearsed_whole(checkpoint, config)[1]


def check_codes(checkpoint: Checkpoint, config: VlmConfig) -> None:
    """The same for a folder of codes."""
    stated = codes_format(checkpoint)
    assert stated is not None
    CodesReader(*_rehearsed_codes(checkpoint, config), stated)


def load_vision(
    checkpoint: Checkpoint,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    tp: TensorParallel | None = None,
    attention_backend: BackendChoice = "auto",
    head: bool = False,
) -> tuple[VisionEncoderModel | VisionStack, ImageProcessor]:
    """What turns images into features: a `VisionStack` for a vision-language model, else a plain SigLIP tower.

    The language model's tensors are not read. head: load a plain tower's MAP head too, for `embeddings`.
    """
    if plain := tower_family(checkpoint):
        log_contradictions([checkpoint])
        facts = plain.images(checkpoint, head=head)
        plan = plain.plan(facts)
        tower, tensors = _rehearsed_tower(checkpoint, facts, plan, tp, attention_backend)
        allocate(tower, torch.device(device), dtype)
        return _filled(tower, plan, tensors), ImageProcessor(facts)
    processor = load_processor(checkpoint)
    family, facts = vlm_family(checkpoint), processor.facts
    unused = family.language_plan(processor.config.language).unused("the language model is not loaded")
    plan = family.vision_plan(facts) + unused
    tensors = tower_weights(checkpoint, family.vision_sources(checkpoint), plan)
    new_stack = partial(VisionStack, facts, tp, attention_backend)
    stack = _rehearsed(new_stack, plan, tensors, facts.vision.num_hidden_layers)
    allocate(stack, torch.device(device), dtype)
    return _filled(stack, plan, tensors), processor


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype most of a checkpoint's values are stored in: what "auto" means."""
    plain = is_vision_only(checkpoint)
    sizes: Counter[torch.dtype] = Counter()
    for tensor in stored_tensors([Source(checkpoint)]) if plain else model_tensors(checkpoint):
        if tensor.dtype is not None:
            sizes[tensor.dtype] += math.prod(tensor.shape)
    if not sizes:
        raise WeightError(f"{checkpoint.root} holds no tensor of floats; {QUANTISED}")
    return sizes.most_common(1)[0][0]


def _rehearsed_whole(
    checkpoint: Checkpoint,
    config: VlmConfig,
    tp: TensorParallel | None = None,
    attention_backend: BackendChoice = "auto",
) -> tuple[VisionLanguageModel, ModelWeights]:
    weights = model_weights(checkpoint, config)
    build = partial(VisionLanguageModel, weights.config, tp, attention_backend)
    return _rehearsed(build, weights.plan, weights.tensors, _depth(config)), weights


def _depth(config: VlmConfig) -> int:
    """Layers of the deeper half."""
    return max(config.language.num_hidden_layers, config.images.vision.num_hidden_layers if config.images else 0)


def _rehearsed_codes(
    checkpoint: Checkpoint, config: VlmConfig, attention_backend: BackendChoice = "auto"
) -> tuple[CodesFile, VisionLanguageModel]:
    """The file of a folder of codes, and the model on the meta device."""
    file = CodesFile(checkpoint)
    language = replace(config.language, tie_embeddings=OWN_HEAD not in file.tensors)
    build = partial(VisionLanguageModel, replace(config, language=language), None, attention_backend)
    model = _built(build, len(file.tensors), _depth(config))
    separate(model.language)
    return file, model


def _rehearsed_tower(
    checkpoint: Checkpoint,
    facts: ImageFacts,
    plan: WeightPlan,
    tp: TensorParallel | None = None,
    attention_backend: BackendChoice = "auto",
) -> tuple[VisionEncoderModel, tuple[StoredTensor, ...]]:
    tensors = tower_weights(checkpoint, [Source(checkpoint)], plan)
    build = partial(VisionEncoderModel, facts.vision, facts.preprocess, tp, attention_backend)
    return _rehearsed(build, plan, tensors, facts.vision.num_hidden_layers), tensors


def _rehearsed(build: Callable[[], M], plan: WeightPlan, tensors: Sequence[StoredTensor], layers: int) -> M:
    """The model on the meta device, its names and shapes compared with the files' headers. layers: of its deeper
    half."""
    model = _built(build, len(tensors), layers)
    rehearse(model, plan, tensors)
    return model


def _built(build: Callable[[], M], tensors: int, layers: int) -> M:
    """The model on the meta device.

    A layer holds at least one tensor. Building a million layers to find that out would take the memory we guard.
    """
    if layers > tensors:
        raise ConfigError(f"num_hidden_layers {layers}: the weights hold only {tensors} tensors")
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, OverflowError) as error:
        raise ConfigError(f"the configuration's sizes are no model's: {error}") from error


def _filled(model: M, plan: WeightPlan, tensors: Sequence[StoredTensor], stages: Mapping[str, Stage] = NO_STAGES) -> M:
    for name, reason in fill(model, plan, tensors, stages=stages):
        logger.debug("ignored %s: %s", name, reason)
    return model.eval().requires_grad_(False)
