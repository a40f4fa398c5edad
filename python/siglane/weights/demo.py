"""The models that ship inside the package: "demo" (NVILA-Lite's layout), "demo-native" (Ovis2.5's), "demo-siglip"."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from siglane.errors import UserError
from siglane.weights.hub import Checkpoint, open_checkpoint

DEMO = "demo"
FOLDERS = {DEMO: "model", "demo-native": "native", "demo-siglip": "siglip"}


def open_model(
    model: str | Path,
    revision: str | None = None,
    *,
    adapter: str | Path | None = None,
    verify_weights: bool | None = None,
) -> Checkpoint:
    """`open_checkpoint`, for users: the names of the shipped models are theirs (`./demo` is a folder of that name).

    adapter: a LoRA adapter's folder or hub id; verify_weights: whether weight files are compared with their SHA-256
    when they are loaded, None: where the folder states it.
    """
    folder = demo_folder() / FOLDERS[model] if isinstance(model, str) and model in FOLDERS else model
    return open_checkpoint(folder, revision, adapter=adapter, verify=verify_weights)


def opened(model: str | Path | Checkpoint, revision: str | None = None, **options: Any) -> Checkpoint:
    """`open_model`, for what may be open already, which then has them. options: as there."""
    if not isinstance(model, Checkpoint):
        return open_model(model, revision, **options)
    given = {"revision": revision, **options}
    if too_late := [name for name, value in given.items() if value is not None]:
        raise TypeError(f"{model.root} is open already; give {', '.join(too_late)} to open_model")
    return model


def demo_folder() -> Path:
    """Where the shipped models and pictures lie. UserError when this installation came without them."""
    folder = files("siglane") / DEMO
    if not isinstance(folder, Path) or not (folder / FOLDERS[DEMO]).is_dir():
        raise UserError("the demo model is not in this installation; install siglane again", code="model_not_found")
    return folder
