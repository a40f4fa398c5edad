"""A model's files: a folder, or a repository id that is downloaded once."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from siglane.config.reader import ConfigReader, read_json
from siglane.errors import ConfigError, UserError

# never code, never pickles: what is not downloaded cannot be run
FILE_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.model", "*merges.txt", "*vocab.txt")
TOKENIZER_PATTERNS = ("*token*.json", "vocab.json", "*.jinja", "*.model", "*merges.txt", "*vocab.txt")
REPOSITORY_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's
DEEPER = ("checkpoint-*", "snapshots/*")  # where a trainer and the hub's cache keep models
FOREIGN = {
    "open_clip_config.json": "OpenCLIP's layout",
    "*.gguf": "llama.cpp's format",
    "*.npz": "big_vision's layout",
    "*.onnx": "ONNX",
    "params.json": "the layout of Meta's and Mistral's own code",
    "*.ckpt": "a trainer's own state",
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder of model files. Names are relative to it; nothing outside it is read.

    adapter: the folder of an adapter that is merged into the weights, where it is another one; verify: whether weight
    files are compared with their checksums when they are loaded, None: with those that lie in the folder.
    """

    root: Path
    adapter: Path | None = None
    verify: bool | None = None

    def path(self, name: str) -> Path:
        return self.root / name

    def has(self, name: str) -> bool:
        """Whether there is a file or a folder called `name`. ConfigError when the system does not tell, and for a link
        to nothing: the model has the file, and what it says is not to be guessed."""
        path = self.path(name)
        try:
            if path.is_symlink() and not path.exists():
                raise ConfigError(
                    f"{path} is a link to {path.readlink()}, which is not there; download the model again"
                )
            return path.exists()
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}; see its permissions") from error

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in file `name`. ConfigError when it is missing, not JSON or not an object."""
        return read_json(self.path(name))

    def optional(self, name: str) -> dict[str, Any]:
        """The same, empty when there is no such file."""
        return self.json(name) if self.has(name) else {}

    def reader(self, name: str = "config.json") -> ConfigReader:
        return ConfigReader(self.json(name), name)

    def digest(self) -> str:
        """Of the names and sizes of all weight and configuration files: another one for another model."""
        digest = hashlib.sha256()
        for root in filter(None, (self.root, self.adapter)):
            for path in sorted((*root.glob("*.json"), *root.glob("**/*.safetensors"))):
                size = path.stat().st_size if path.exists() else 0
                digest.update(f"{path.relative_to(root)} {size}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def sub(self, name: str) -> Checkpoint:
        """Folder `name`. ConfigError when it is missing."""
        if not self.path(name).is_dir():
            raise ConfigError(f"{self.root} has no folder {name!r}; was the whole model copied?")
        return Checkpoint(self.path(name))


@dataclass(frozen=True, slots=True)
class Source:
    """A folder of safetensors files; `prefix` is put in front of its tensors' names (VILA keeps parts in folders)."""

    folder: Checkpoint
    prefix: str = ""


def open_checkpoint(
    model: str | Path,
    revision: str | None = None,
    *,
    patterns: Sequence[str] = FILE_PATTERNS,
    adapter: str | Path | None = None,
    verify: bool | None = None,
) -> Checkpoint:
    """The files of `model`: a folder, or a Hugging Face repository id at `revision` (a branch, tag or commit).

    A repository is downloaded into the hub's cache, or found there; only the files that match `patterns` are fetched,
    by default configurations, tokenizers and safetensors. adapter: a folder or id of one to be merged into the weights;
    a `model` that is itself an adapter without weights is merged into the base that it names. UserError
    `model_not_found` says what to do when there is nothing to open.
    """
    found = Checkpoint(_folder(model, revision, patterns), verify=verify)
    if adapter is not None:
        if not (folder := _folder(adapter, None, patterns)).joinpath(ADAPTER_CONFIG).is_file():
            message = f"{adapter} holds no {ADAPTER_CONFIG}; give the folder that PEFT's save_pretrained wrote"
            raise UserError(message, code="bad_adapter", param="adapter")
        return replace(found, adapter=folder)
    described = "*.json" in patterns and ("*.safetensors" in patterns or not found.has("config.json"))
    if described and is_adapter_alone(found):
        return replace(found, root=_base(found, patterns), adapter=found.root)
    return found


def without_config(folder: Path) -> str:
    """Why a folder without config.json is no model to siglane: what lies there instead, and what to do."""
    inside = [path.parent for pattern in DEEPER for path in folder.glob(f"{pattern}/config.json")]
    if inside:
        newest = max(inside, key=lambda path: (path.stat().st_mtime, path.name))
        return f"{folder} has no config.json; models lie deeper in it: give {newest}"
    for pattern, layout in FOREIGN.items():
        if found := next(folder.glob(pattern), None):
            return (
                f"{folder} has no config.json; {found.name} is {layout}, which siglane does not read; give the folder "
                "that transformers saves, or that the hub has for transformers"
            )
    return f"{folder} has no config.json; give the folder of a model"


def is_adapter_alone(folder: Checkpoint) -> bool:
    """Whether an adapter lies in `folder` without the weights that it changes."""
    if not folder.has(ADAPTER_CONFIG):
        return False
    weights = (
        *folder.root.glob("*.safetensors"),
        *folder.root.glob("*/*.safetensors"),
        *folder.root.glob("pytorch_model*.bin"),
    )
    return all(file.name.startswith("adapter_model.") for file in weights)


def _base(adapter: Checkpoint, patterns: Sequence[str]) -> Path:
    """The folder of the model that an adapter names as its base; a relative path may also start from the adapter's."""
    reader = adapter.reader(ADAPTER_CONFIG)
    if not reader.has("base_model_name_or_path"):
        raise _not_found(f"{adapter.root} is an adapter and names no base; give the base, and this folder as --adapter")
    named = reader.value("base_model_name_or_path", str)
    revision = reader.value("revision", str) if reader.has("revision") else None
    try:
        beside = adapter.root / named
        base = Checkpoint(beside if beside.is_dir() else _folder(named, revision, patterns))
    except UserError as error:
        raise _not_found(
            f"{adapter.root} is an adapter of {named!r}, which cannot be had: {error.message}; give the base as the "
            "model, and this folder as --adapter"
        ) from error
    if is_adapter_alone(base):
        raise _not_found(f"{adapter.root} is an adapter of {named!r}, which is an adapter itself; merge that one first")
    return base.root


def _folder(model: str | Path, revision: str | None, patterns: Sequence[str]) -> Path:
    """Where the files of `model` lie, downloaded where it is a hub id."""
    folder = Path(model).expanduser()
    try:
        if str(model) and folder.is_dir():
            return folder
        if str(model) and folder.exists():
            raise _not_found(f"{folder} is a file; give the folder that holds config.json")
    except OSError as error:
        raise _not_found(f"{folder} cannot be read: {error.strerror}; see its permissions") from error
    if isinstance(model, Path) or not REPOSITORY_ID.fullmatch(model):
        raise _not_found(f"there is no folder {str(model)!r}; give a model's folder or its hub id (owner/name)")
    return _download(model, revision, patterns)


def _download(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise _not_found(_why(error, repository, revision)) from error


def _why(error: Exception, repository: str, revision: str | None) -> str:
    """Why there is no copy of a repository, and what to do."""
    from huggingface_hub import errors

    match error:
        case errors.GatedRepoError():
            return f"{repository} is gated; accept its terms on the hub, then log in with `hf auth login`"
        case errors.RevisionNotFoundError():
            return f"{repository} has no revision {revision!r}; leave it out for the newest"
        case errors.RepositoryNotFoundError():
            return (
                f"there is no folder and no hub repository {repository!r}; check the name, or log in if it is private"
            )
        case errors.HFValidationError():
            return f"{repository!r} is neither a folder nor a hub id: {error}"
        case errors.LocalEntryNotFoundError():
            return (
                f"{repository!r} is not a folder, not in the local cache, and the hub cannot be reached; "
                "connect once to download it, or give a folder"
            )
        case _:
            return f"downloading {repository} failed: {error}; try again, or give a folder"


def _not_found(message: str) -> UserError:
    return UserError(message, code="model_not_found", param="model")
