"""What commands share: the model and picture arguments, how pictures are decoded, and one JSON document on stdout."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from siglane.errors import UserError
from siglane.settings.flags import add_options, read_options

if TYPE_CHECKING:
    from siglane.config.preprocess import DecodeConfig
    from siglane.families.processor import ImageProcessor
    from siglane.weights.hub import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonOptions:
    debug: bool = field(default=False, metadata={"help": "log more, and show the traceback of an error"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a hub id"})


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureOptions:
    """The decode contract's switches, under the names that the server uses too."""

    image_alpha: Literal["white", "drop"] = field(
        default="white", metadata={"help": "transparent pixels: composed on white, or drop the alpha channel"}
    )
    image_16bit: Literal["scale", "clip"] = field(
        default="scale", metadata={"help": "16-bit pictures: scale to 8 bit, or clip as Pillow's convert does"}
    )
    max_image_pixels: int = field(default=33_000_000, metadata={"help": "larger pictures are refused"})

    def decode_config(self) -> DecodeConfig:
        from siglane.config.preprocess import LOCAL_DECODE

        return replace(LOCAL_DECODE, alpha=self.image_alpha, depth16=self.image_16bit, max_pixels=self.max_image_pixels)


def add_common(parser: argparse.ArgumentParser) -> None:
    add_options(parser, CommonOptions, "common")


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder, a hub id, or `demo`")
    add_options(parser, ModelOptions, "model")


def checkpoint_of(arguments: argparse.Namespace) -> Checkpoint:
    """The files of MODEL. Cheap: call it before the slow imports, so that a wrong name is reported at once."""
    from siglane.weights.demo import open_model

    return open_model(arguments.model, read_options(ModelOptions, arguments).revision)


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


def emit_json(document: Any, out: TextIO) -> None:
    """Exactly one JSON document. ASCII, so that any file name survives any terminal."""
    out.write(json.dumps(document, allow_nan=False) + "\n")
