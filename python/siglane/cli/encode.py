"""`siglane encode`: the vision features of pictures, written to a safetensors file."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from siglane.cli.common import BUDGET, IMAGES, MODEL, MODEL_ARGUMENT, Argument, checkpoint_of
from siglane.cli.output import check_writable, emit_json, emit_line, write_tensors
from siglane.errors import UserError
from siglane.look.words import counted
from siglane.settings.engine import EngineConfig
from siglane.settings.flags import OptionGroup, read_options
from siglane.settings.media import DecodeOptions
from siglane.settings.options import CommandOptions, described, option
from siglane.tiling.rule import ImageBudget

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeOptions(CommandOptions):
    COMMAND = "encode"

    output: Path = field(
        metadata=described('a safetensors file: "0", "1", ... and, with a projector, "projected.0", ...', short="-o")
    )
    json: bool = option(False, "print the shapes as one JSON list")


# the engine's options that a tower has a use for
ENGINE_OPTIONS = ("device", "dtype", "attention_backend", "max_batch_patches", "enable_packing")

ARGUMENTS = (MODEL_ARGUMENT, Argument("images", "IMAGE", "pictures: paths or URLs", nargs="+"))
OPTIONS = (
    OptionGroup(EncodeOptions, "encode"),
    MODEL,
    IMAGES,
    BUDGET,
    OptionGroup(EngineConfig, "engine", only=ENGINE_OPTIONS),
)


def run(arguments: argparse.Namespace, out: TextIO) -> int:
    options = read_options(EncodeOptions, arguments)
    check_writable(options.output)
    checkpoint = checkpoint_of(arguments)

    from tqdm import tqdm

    from siglane.llm import VisionEncoder

    engine = read_options(EngineConfig, arguments)
    chosen = {name: getattr(engine, name) for name in ENGINE_OPTIONS}
    decode = read_options(DecodeOptions, arguments).local
    encoder = VisionEncoder(checkpoint, decode=decode, budget=read_options(ImageBudget, arguments), **chosen)
    tensors: dict[str, torch.Tensor] = {}
    rows: list[dict[str, Any]] = []
    quiet = not sys.stderr.isatty() or len(arguments.images) == 1
    encoded = tqdm(encoder.stream(arguments.images), total=len(arguments.images), unit="image", disable=quiet)
    failures: list[UserError] = []
    for number, (image, one) in enumerate(zip(arguments.images, encoded, strict=True)):
        if isinstance(one, UserError):
            failures.append(one)
            rows.append({"image": image, "error": one.message})
            print(f"siglane: number {number} is left out: {one.message}", file=sys.stderr)
            continue
        tensors[str(number)] = one.projector_input
        rows.append({"image": image, "features": list(one.projector_input.shape)})
        if one.rows is not None:
            tensors[f"projected.{number}"] = one.rows
            rows[-1]["projected"] = list(one.rows.shape)
    if not tensors:
        raise failures[0]
    write_tensors(tensors, options.output)
    if options.json:
        emit_json(rows, out)
    else:
        images = counted(len(rows) - len(failures), "image")
        emit_line(f"{options.output}: {counted(len(tensors), 'tensor')} of {images}", out)
    return 0
