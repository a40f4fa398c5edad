"""Which models siglane takes over inside SGLang, and where their views are."""

from __future__ import annotations

from pathlib import Path

from siglane.hosts import view
from siglane.hosts.sglang.settings import host_config

# architectures for which SGLang 0.5.23 has classes of its own
BUILT_IN = ("NVILAForConditionalGeneration", "NVILALiteForConditionalGeneration", "LlavaQwenForCausalLM")


def view_of(model: str, revision: str | None = None) -> Path | None:
    """`hosts/view.py: view_of` for SGLang."""
    config = host_config()
    return view.view_of(model, revision, view.Host("SGLang", BUILT_IN, config.sglang_override, config.sglang_views))
