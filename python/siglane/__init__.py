"""SigLIP vision for language models: written once, served anywhere.

`import siglane` loads nothing; the names below are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from siglane.errors import EngineError, SiglaneError, UserError
    from siglane.llm import LLM, Generation, VisionEncoder
    from siglane.tagging.tagger import Tag, Tagged, Tagger
    from siglane.types import Constraint, Decision, Question, SamplingParams
    from siglane.vision.packed import convert_from_packing_format, convert_to_packing_format, encode_packed

__all__ = [
    "LLM",
    "Constraint",
    "Decision",
    "EngineError",
    "Generation",
    "Question",
    "SamplingParams",
    "SiglaneError",
    "Tag",
    "Tagged",
    "Tagger",
    "UserError",
    "VisionEncoder",
    "convert_from_packing_format",
    "convert_to_packing_format",
    "encode_packed",
]
__version__ = "0.1.0"

_HOMES = {
    "LLM": "siglane.llm",
    "Generation": "siglane.llm",
    "VisionEncoder": "siglane.llm",
    "Constraint": "siglane.types",
    "Decision": "siglane.types",
    "Question": "siglane.types",
    "SamplingParams": "siglane.types",
    "Tag": "siglane.tagging.tagger",
    "Tagged": "siglane.tagging.tagger",
    "Tagger": "siglane.tagging.tagger",
    "EngineError": "siglane.errors",
    "SiglaneError": "siglane.errors",
    "UserError": "siglane.errors",
    "convert_from_packing_format": "siglane.vision.packed",
    "convert_to_packing_format": "siglane.vision.packed",
    "encode_packed": "siglane.vision.packed",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'siglane' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
