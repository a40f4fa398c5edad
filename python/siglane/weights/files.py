"""The files of a checkpoint that hold tensors: which they are, and opening one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from siglane.config.reader import LFS_POINTER, read_json
from siglane.errors import WeightError
from siglane.weights.hub import ADAPTER_WEIGHTS, Checkpoint

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth")
SHARD = re.compile(r"(\d{5})-of-(\d{5})")


def weight_files(folder: Checkpoint) -> list[Path]:
    """The safetensors files of `folder`, an adapter's left out. WeightError when there is none, or one is missing."""
    if folder.path(SINGLE).is_symlink() or folder.has(SINGLE):  # opening it says what is wrong with a link
        return [folder.path(SINGLE)]
    if folder.has(INDEX):
        return _indexed_files(folder)
    if found := sorted(path for path in folder.root.glob("*.safetensors") if path.name != ADAPTER_WEIGHTS):
        _check_complete(folder.root, found)
        return found
    if pickles := sorted(path.name for pattern in PICKLES for path in folder.root.glob(pattern)):
        raise WeightError(
            f"{folder.root} holds only pickled weights ({pickles[0]}), which can run code when opened; convert them "
            "with `safetensors.torch.save_file(torch.load(file, weights_only=True), 'model.safetensors')`"
        )
    raise WeightError(f"{folder.root} holds no *.safetensors file; was the model downloaded completely?")


def _check_complete(root: Path, files: Sequence[Path]) -> None:
    """WeightError for shards without an index of which one is missing, as their own names tell."""
    for shard in filter(None, (SHARD.search(file.name) for file in files)):
        number, total = shard.groups()
        every = [shard.string.replace(f"{number}-of", f"{one:0{len(number)}}-of") for one in range(1, int(total) + 1)]
        if missing := [name for name in every if not (root / name).exists()]:
            raise WeightError(f"{root} holds {shard.string}, but not {missing[0]}; download the model again")


def _indexed_files(folder: Checkpoint) -> list[Path]:
    """The files of a sharded checkpoint. Every one is there and holds exactly the tensors the index gives it."""
    index = folder.path(INDEX)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise WeightError(f"{index}: weight_map must map tensor names to file names")
    files = []
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not folder.path(name).exists():
            raise WeightError(f"{index} lists {name}, which is not in the folder; download the model again")
        listed = {key for key, file in weight_map.items() if file == name}
        with open_weights(folder.path(name)) as handle:
            held = set(handle.keys())
        if listed != held:
            example = min(listed ^ held)
            place = "the index, not in the file" if example in listed else "the file, not in the index"
            raise WeightError(f"{index} and {name} disagree: tensor {example} is in {place}; download the model again")
        files.append(folder.path(name))
    return files


def open_weights(file: Path) -> Any:
    """safetensors' handle of `file`. WeightError says why it cannot be read and what to do."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise WeightError(_why(file, error)) from error


def _why(file: Path, error: Exception) -> str:
    try:
        if file.is_symlink() and not file.exists():
            return f"{file} is a link to {file.readlink()}, which is not there; download the model again"
        if file.is_dir():
            return f"{file} is a folder, not a safetensors file; download the model again"
        with file.open("rb") as stream:
            start = stream.read(len(LFS_POINTER))
        size = file.stat().st_size
    except OSError as unreadable:
        return f"{file} cannot be read: {unreadable.strerror}; see its permissions, or download it again"
    if start == LFS_POINTER:
        reason = "it is a Git LFS pointer, not the weights; run `git lfs pull` or download it again"
    elif not start:
        reason = "it is empty; download it again"
    else:
        reason = f"{error}; it holds {size} bytes; download it again"
    return f"{file} is not a usable safetensors file: {reason}"
