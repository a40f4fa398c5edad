"""The module for a projector's facts, and its plan."""

from __future__ import annotations

from siglane.config.projector import ProjectorConfig
from siglane.nn.parallel import TensorParallel
from siglane.nn.plan import WeightPlan
from siglane.projector.mlp import Projector, layers_plan
from siglane.projector.visual_vocabulary import VisualVocabulary, vocabulary_plan


def build_projector(config: ProjectorConfig, tp: TensorParallel | None = None) -> Projector | VisualVocabulary:
    return Projector(config, tp) if config.vocabulary is None else VisualVocabulary(config, tp)


def projector_plan(config: ProjectorConfig) -> WeightPlan:
    return layers_plan(config) if config.vocabulary is None else vocabulary_plan(config)
