"""A model's files: a folder, or a repository id that is downloaded once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siglane.config.reader import ConfigReader, read_json
from siglane.errors import ConfigError, UserError

# never code, never pickles: what is not downloaded cannot be run
FILE_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.model", "*merges.txt", "*vocab.txt")
TOKENIZER_PATTERNS = ("*token*.json", "vocab.json", "*.jinja", "*.model", "*merges.txt", "*vocab.txt")
REPOSITORY_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder of model files. Names are relative to it; nothing outside it is read."""

    root: Path

    def path(self, name: str) -> Path:
        return self.root / name

    def has(self, name: str) -> bool:
        """Whether there is a file or a folder called `name`."""
        return self.path(name).exists()

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in file `name`. ConfigError when it is missing, not JSON or not an object."""
        return read_json(self.path(name))

    def optional(self, name: str) -> dict[str, Any]:
        """The same, empty when there is no such file."""
        return self.json(name) if self.has(name) else {}

    def reader(self, name: str = "config.json") -> ConfigReader:
        return ConfigReader(self.json(name), name)

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
    model: str | Path, revision: str | None = None, *, patterns: Sequence[str] = FILE_PATTERNS
) -> Checkpoint:
    """The files of `model`: a folder, or a Hugging Face repository id at `revision` (a branch, tag or commit).

    A repository is downloaded into the hub's cache, or found there; only the files that match `patterns` are fetched,
    by default configurations, tokenizers and safetensors. UserError `model_not_found` says what to do when there is
    nothing to open.
    """
    folder = Path(model).expanduser()
    if str(model) and folder.is_dir():
        return Checkpoint(folder)
    if str(model) and folder.exists():
        raise _not_found(f"{folder} is a file; give the folder that holds config.json")
    if isinstance(model, Path) or not REPOSITORY_ID.fullmatch(model):
        raise _not_found(f"there is no folder {str(model)!r}; give a model's folder or its hub id (owner/name)")
    return Checkpoint(_download(model, revision, patterns))


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
