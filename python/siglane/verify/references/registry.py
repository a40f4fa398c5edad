"""Which reference implementation a checkpoint has, told from its JSON files alone."""

from __future__ import annotations

from pathlib import Path

from siglane.verify.references import (
    bee,
    causal_lm,
    idefics3,
    llava_onevision,
    llava_qwen,
    nanovlm,
    nvila,
    ovis2_5,
    ovis2_6,
    r_4b,
    siglip,
    siglip2,
    video_llama_3,
    videollama3_qwen2,
)
from siglane.verify.references.reference import ReferenceFamily

MODULES = (
    r_4b, bee, llava_qwen, ovis2_6, siglip, siglip2, nvila, ovis2_5, llava_onevision, nanovlm, idefics3, video_llama_3,
    videollama3_qwen2, causal_lm,
)  # fmt: skip
FAMILIES: tuple[ReferenceFamily, ...] = tuple(module.FAMILY for module in MODULES)


def family_of(folder: Path) -> ReferenceFamily | None:
    """None when there is no reference for what lies in `folder`."""
    return next((family for family in FAMILIES if family.matches(folder)), None)
