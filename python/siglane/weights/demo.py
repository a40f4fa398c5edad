"""The models that ship inside the package: "demo" (NVILA-Lite's layout), "demo-native" (Ovis2.5's), "demo-siglip"."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from siglane.errors import UserError
from siglane.weights.hub import Checkpoint, open_checkpoint

DEMO = "demo"
FOLDERS = {DEMO: "model", "demo-native": "native", "demo-siglip": "siglip"}


def open_model(model: str | Path, revision: str | None = None) -> Checkpoint:
    """`open_checkpoint`, for users: the names of the shipped models are theirs (`./demo` is a folder of that name)."""
    if isinstance(model, str) and model in FOLDERS:
        return Checkpoint(demo_folder() / FOLDERS[model])
    return open_checkpoint(model, revision)


def demo_folder() -> Path:
    """Where the shipped models and pictures lie. UserError when this installation came without them."""
    folder = files("siglane") / DEMO
    if not isinstance(folder, Path) or not (folder / FOLDERS[DEMO]).is_dir():
        raise UserError("the demo model is not in this installation; install siglane again", code="model_not_found")
    return folder
