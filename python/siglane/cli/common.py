"""What commands are told alike: their common options, and the MODEL argument."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from siglane.errors import UserError
from siglane.settings.flags import OptionGroup, read_options
from siglane.settings.media import DecodeOptions
from siglane.settings.options import option
from siglane.tiling.rule import ImageBudget

if TYPE_CHECKING:
    from siglane.families.processor import ImageProcessor
    from siglane.weights.hub import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonOptions:
    config: Path | None = option(None, "a TOML or YAML file with settings of this command under its name: [serve]")
    debug: bool = option(False, "log more, and show the traceback of an error")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    revision: str | None = option(None, "branch, tag or commit of a hub id")
    adapter: str | None = option(None, "folder or hub id of a LoRA adapter (PEFT) to merge into the weights")
    verify_weights: bool | None = option(
        None, "compare weight files with their SHA-256; none: where the folder states it, on: every file"
    )


@dataclass(frozen=True, slots=True)
class Argument:
    """What a command takes without a flag. nargs: as argparse has it; type: text -> value."""

    name: str
    metavar: str
    help: str
    nargs: Literal["*", "+", "?"] | None = None
    type: Callable[[str], object] = str


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


def check_base_url(url: str) -> str:
    """Without `/v1` at its end. UserError for what is no address of a server."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        message = f"--base-url {url!r} is no http:// or https:// address"
        raise UserError(message, code="bad_option", param="base_url")
    return url.rstrip("/").removesuffix("/v1")
