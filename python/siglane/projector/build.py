"""The module for a projector's facts."""

from __future__ import annotations

from siglane.config.projector import ProjectorConfig
from siglane.nn.parallel import TensorParallel
from siglane.projector.mlp import Projector
from siglane.projector.visual_vocabulary import VisualVocabulary


def build_projector(config: ProjectorConfig, tp: TensorParallel | None = None) -> Projector | VisualVocabulary:
    return Projector(config, tp) if config.vocabulary is None else VisualVocabulary(config, tp)
