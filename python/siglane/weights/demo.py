"""The model that ships inside the package. Its name is "demo"."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from siglane.errors import UserError
from siglane.weights.hub import Checkpoint, open_checkpoint

DEMO = "demo"


def open_model(model: str | Path, revision: str | None = None) -> Checkpoint:
    """`open_checkpoint`, for users: the name "demo" is the shipped model (`./demo` is a folder of that name)."""
    return Checkpoint(demo_folder() / "model") if model == DEMO else open_checkpoint(model, revision)


def demo_folder() -> Path:
    """Where the shipped model and its picture lie. UserError when this installation came without them."""
    folder = files("siglane") / DEMO
    if not isinstance(folder, Path) or not (folder / "model").is_dir():
        raise UserError("the demo model is not in this installation; install siglane again", code="model_not_found")
    return folder
