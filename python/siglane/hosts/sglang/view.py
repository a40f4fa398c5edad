"""Which models siglane takes over inside SGLang, and where their views are."""

from __future__ import annotations

from pathlib import Path

from siglane.hosts import view
from siglane.hosts.settings import SglangHostConfig
from siglane.settings.options import read_environment

# architectures for which SGLang 0.5.23 has classes of its own
BUILT_IN = ("NVILAForConditionalGeneration", "NVILALiteForConditionalGeneration", "LlavaQwenForCausalLM")


def view_of(model: str, revision: str | None = None) -> Path | None:
    """`hosts/view.py: view_of` for SGLang."""
    config = read_environment(SglangHostConfig)
    return view.view_of(model, revision, view.Host("SGLang", BUILT_IN, config.sglang_override, config.sglang_views))
