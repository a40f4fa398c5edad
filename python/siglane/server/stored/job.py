"""What the answers of a batch are made from beside its requests: whoever continues a batch must have the same."""

from __future__ import annotations

import dataclasses
from typing import Any

from siglane.engine.process.child import EngineSpec
from siglane.settings.media import MediaConfig
from siglane.settings.options import options_of
from siglane.settings.server import ServerConfig
from siglane.tiling.rule import ImageBudget
from siglane.weights.hub import Checkpoint

NUMERICS = ("dtype", "vision_dtype", "quantization", "attention_backend", "paged_backend")
ANSWERS = ("sampling_defaults", "default_temperature", "tagger")


def job_of(config: ServerConfig, spec: EngineSpec, limits: ImageBudget, checkpoint: Checkpoint) -> dict[str, Any]:
    """By the names that a user knows."""
    return {
        "model": spec.model,
        "revision": spec.revision,
        "adapter": spec.adapter,
        "model_files": checkpoint.digest(),
        **{name: getattr(config, name) for name in ANSWERS},
        **{option.name: getattr(config, option.name) for option in options_of(MediaConfig)},
        **dataclasses.asdict(limits),
        **{name: getattr(spec.config, name) for name in NUMERICS},
    }
