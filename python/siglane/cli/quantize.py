"""`siglane quantize`: a model's folder in 8 or 4 bits, which loads in seconds."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TextIO

from siglane.cli.common import MODEL, MODEL_ARGUMENT, checkpoint_of
from siglane.cli.output import emit_json, emit_line
from siglane.errors import UserError
from siglane.settings.flags import OptionGroup, read_options
from siglane.settings.options import CommandOptions, described, option


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions(CommandOptions):
    COMMAND = "quantize"

    output: Path = field(metadata=described("the folder to write, which is not there yet", short="-o"))
    quantization: Literal["8bit", "4bit"] = option("8bit", "bits that the weights of linear layers are kept in")
    json: bool = option(False, "print folder, bits and bytes as one JSON object")


ARGUMENTS = (MODEL_ARGUMENT,)
OPTIONS = (OptionGroup(QuantizeOptions, "quantize"), MODEL)


def run(arguments: argparse.Namespace, out: TextIO) -> int:
    options = read_options(QuantizeOptions, arguments)
    output = options.output
    if not output.absolute().parent.is_dir():
        raise UserError(f"cannot write {output}: there is no folder {output.parent}", code="cannot_write")
    checkpoint = checkpoint_of(arguments)

    from siglane.families.codes_folder import write_folder

    size = write_folder(checkpoint, output, options.quantization)
    if options.json:
        emit_json({"folder": str(output), "quantization": options.quantization, "bytes": size}, out)
    else:
        emit_line(f"{output}: {options.quantization}, {size / 1e6:.1f} MB of weights", out)
    return 0
