"""What commands share: their common options, the MODEL argument, and one JSON document on stdout."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO
from urllib.parse import urlsplit

from siglane.errors import UserError
from siglane.settings.flags import OptionGroup, read_options
from siglane.settings.media import DecodeOptions
from siglane.tiling.rule import ImageBudget

if TYPE_CHECKING:
    import torch

    from siglane.families.processor import ImageProcessor
    from siglane.weights.hub import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonOptions:
    config: Path | None = field(
        default=None,
        metadata={"help": "a TOML or YAML file with settings of this command under its name: [serve]"},
    )
    debug: bool = field(default=False, metadata={"help": "log more, and show the traceback of an error"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a hub id"})
    adapter: str | None = field(
        default=None, metadata={"help": "folder or hub id of a LoRA adapter (PEFT) to merge into the weights"}
    )
    verify_weights: bool | None = field(
        default=None,
        metadata={"help": "compare weight files with their SHA-256; none: where the folder states it, on: every file"},
    )


@dataclass(frozen=True, slots=True)
class Argument:
    """What a command takes without a flag. nargs: as argparse has it; type: text -> value."""

    name: str
    metavar: str
    help: str
    nargs: Literal["*", "+", "?"] | None = None
    type: Callable[[str], object] = str


UNPRINTED = ("Cc", "Cs", "Zl", "Zp")  # control characters, half surrogate pairs, line and paragraph separators
MODEL_ARGUMENT = Argument("model", "MODEL", "a checkpoint folder, a hub id, or `demo`")
COMMON = (OptionGroup(CommonOptions, "common"),)
MODEL = OptionGroup(ModelOptions, "model")
IMAGES = OptionGroup(DecodeOptions, "images")
BUDGET = OptionGroup(ImageBudget, "budget")


def checkpoint_of(arguments: argparse.Namespace) -> Checkpoint:
    """The files of MODEL. Cheap: call it before the slow imports, so that a wrong name is reported at once."""
    from siglane.weights.demo import open_model

    return open_model(arguments.model, **asdict(read_options(ModelOptions, arguments)))


def load_image_processor(checkpoint: Checkpoint) -> ImageProcessor:
    """What lays out pictures for any checkpoint, plain SigLIP towers included. Reads no weights."""
    from siglane.families.processor import ImageProcessor, load_processor
    from siglane.families.registry import tower_family

    if tower := tower_family(checkpoint):
        return ImageProcessor(tower.images(checkpoint))
    return load_processor(checkpoint)


def check_writable(path: Path) -> None:
    """UserError when a file cannot be written at `path`: said before the work is done, not after."""
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {folder}", code="cannot_write")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        reason = "it is a folder" if path.is_dir() else "permission denied"
        raise UserError(f"cannot write {path}: {reason}", code="cannot_write")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """UserError when the system refuses what is written to `path` inside."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", code="cannot_write") from error


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """A safetensors file. UserError when it cannot be written."""
    from safetensors.torch import save_file

    owned = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}  # slices share their storage
    try:
        save_file(owned, path)
    except Exception as error:  # SafetensorError wraps the system's message
        raise UserError(f"cannot write {path}: {error}", code="cannot_write") from error


def emit_json(document: Any, out: TextIO) -> None:
    """Exactly one JSON document. ASCII, so that any file name survives any terminal."""
    out.write(json.dumps(document, allow_nan=False) + "\n")


def emit_line(text: str, out: TextIO) -> None:
    """One line for people, whatever file names it holds: what would break the line or move the cursor is escaped, and
    so is a byte that is not UTF-8, as in JSON (`\\udce9` is the byte E9)."""
    out.write(printed(text) + "\n")


def check_base_url(url: str) -> str:
    """Without `/v1` at its end. UserError for what is no address of a server."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        message = f"--base-url {url!r} is no http:// or https:// address"
        raise UserError(message, code="bad_option", param="base_url")
    return url.rstrip("/").removesuffix("/v1")


def printed(text: str, keep: str = "") -> str:
    """`text` with what a terminal would obey escaped; keep: characters of those that stay."""
    return "".join(_printed(character) if character not in keep else character for character in text)


def _printed(character: str) -> str:
    if unicodedata.category(character) not in UNPRINTED:
        return character
    return character.encode("unicode_escape").decode()
