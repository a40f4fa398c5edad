"""What commands write: files, one JSON document, and lines for people."""

from __future__ import annotations

import contextlib
import json
import os
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from siglane.errors import UserError

if TYPE_CHECKING:
    import torch

UNPRINTED = ("Cc", "Cs", "Zl", "Zp")  # control characters, half surrogate pairs, line and paragraph separators


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


def printed(text: str, keep: str = "") -> str:
    """`text` with what a terminal would obey escaped; keep: characters of those that stay."""
    return "".join(_printed(character) if character not in keep else character for character in text)


def _printed(character: str) -> str:
    if unicodedata.category(character) not in UNPRINTED:
        return character
    return character.encode("unicode_escape").decode()
