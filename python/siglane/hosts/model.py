"""siglane's half of a model inside a host: tower and projector, and the one pass over the weights that fills both
halves. A host's model class holds `vision` beside its own language model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from siglane.families.model import check_model
from siglane.families.parallel import EncoderParallel, ParallelStack
from siglane.families.processor import load_processor
from siglane.families.registry import vlm_family
from siglane.hosts.config import SiglaneConfig
from siglane.hosts.weights import known_tensors, language_tensors
from siglane.nn.parallel import TensorParallel
from siglane.weights.load import StrictLoad

logger = logging.getLogger(__name__)

T = TypeVar("T")
Tensors = Iterable[tuple[str, torch.Tensor]]


def of_group(group: Any) -> TensorParallel:
    """The tower's ranks in a host. group: SGLang's or vLLM's own kind, which know the same words."""
    return TensorParallel(group.rank_in_group, group.world_size, group.all_reduce, group.all_gather)


class HostModel:
    """config: of a view (`view.py`). ConfigError or WeightError when its checkpoint is not what it was."""

    def __init__(self, config: SiglaneConfig, tp: TensorParallel, parallel: EncoderParallel) -> None:
        self.checkpoint = config.files()
        self.family = vlm_family(self.checkpoint)
        processor = load_processor(self.checkpoint)
        self.weights = check_model(self.checkpoint, processor.config)
        self.facts, self.images = self.weights.config, processor.facts
        self.vision = ParallelStack(self.images, tp, parallel)
        self.loaded = False
        logger.info("siglane: %s, %s", self.facts.family, self.vision.share())

    def load(self, weights: Tensors, language: Callable[[Tensors], T]) -> T:
        """What `language` makes of the language model's tensors. The first pass must fill every parameter of tower and
        projector; later ones, updates, may bring some."""
        load = StrictLoad(self.family.vision_plan(self.images), self.vision.stack)
        named = known_tensors(weights, self.checkpoint, self.weights, whole=not self.loaded)
        names = {tensor.name: tensor.name for tensor in self.weights.tensors}
        tensors = language_tensors(named, names, load, self.family, self.facts, whole=not self.loaded)
        if self.loaded:
            return language(tensors)
        with load:
            result = language(tensors)
        self.vision.eval().requires_grad_(False)
        self.loaded = True
        return result
