"""The model that `soak.py` asks: an Ovis2.5 of a few thousand random weights, whose chat template knows tools."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from tokenizers import AddedToken

from siglane.families.prompt.call_format import HERMES

TESTS = Path(__file__).parents[1] / "tests"
sys.path += [str(TESTS), str(TESTS / "parity"), str(TESTS / "unit")]


def write_model(folder: Path) -> None:
    """In an empty or new folder."""
    tags = [AddedToken(text, special=False, normalized=False) for text in ("<tool_call>", "</tool_call>")]
    template = import_module("scripted_checkpoint").TEMPLATES[HERMES]
    import_module("ovis2_5_checkpoint").write_ovis2_5_checkpoint(folder, chat_template=template, added=tags)
