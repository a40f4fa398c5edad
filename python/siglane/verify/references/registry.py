"""Which reference implementation a checkpoint has, told from its JSON files alone."""

from __future__ import annotations

from pathlib import Path

from siglane.verify.references import causal_lm, idefics3, llava_onevision, nanovlm, nvila, ovis2_5, siglip, siglip2
from siglane.verify.references.reference import ReferenceFamily

FAMILIES: tuple[ReferenceFamily, ...] = (
    siglip.FAMILY,
    siglip2.FAMILY,
    nvila.FAMILY,
    ovis2_5.FAMILY,
    llava_onevision.FAMILY,
    nanovlm.FAMILY,
    idefics3.FAMILY,
    causal_lm.FAMILY,
)


def family_of(folder: Path) -> ReferenceFamily | None:
    """None when there is no reference for what lies in `folder`."""
    return next((family for family in FAMILIES if family.matches(folder)), None)
