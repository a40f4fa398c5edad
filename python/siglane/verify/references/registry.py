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

FAMILIES: tuple[ReferenceFamily, ...] = (
    r_4b.FAMILY,
    bee.FAMILY,
    llava_qwen.FAMILY,
    ovis2_6.FAMILY,
    siglip.FAMILY,
    siglip2.FAMILY,
    nvila.FAMILY,
    ovis2_5.FAMILY,
    llava_onevision.FAMILY,
    nanovlm.FAMILY,
    idefics3.FAMILY,
    video_llama_3.FAMILY,
    videollama3_qwen2.FAMILY,
    causal_lm.FAMILY,
)


def family_of(folder: Path) -> ReferenceFamily | None:
    """None when there is no reference for what lies in `folder`."""
    return next((family for family in FAMILIES if family.matches(folder)), None)
