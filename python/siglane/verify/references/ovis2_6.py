"""Ovis2.6: Ovis2.5's reference, whose language model may have experts."""

from __future__ import annotations

from pathlib import Path

from siglane.verify.references.files import classes_in, read_json
from siglane.verify.references.ovis2_5 import Ovis2_5
from siglane.verify.references.reference import ReferenceFamily


def _matches(folder: Path) -> bool:
    root = read_json(folder / "config.json")
    named = classes_in(root)
    if named:
        return not {"Ovis2_6ForCausalLM", "Ovis2_6_MoeForCausalLM"}.isdisjoint(named)
    return root.get("model_type") in ("ovis2_6", "ovis2_6_moe")


FAMILY = ReferenceFamily(name="ovis2_6", speaks=True, matches=_matches, load=Ovis2_5)
