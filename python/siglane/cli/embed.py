"""`siglane embed`: vectors of pictures and texts by a SigLIP with both towers."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from siglane.cli.common import (
    IMAGES,
    MODEL,
    MODEL_ARGUMENT,
    Argument,
    ModelOptions,
    check_writable,
    emit_json,
    emit_line,
    write_tensors,
)
from siglane.errors import UserError
from siglane.settings.flags import OptionGroup, read_options
from siglane.settings.media import DecodeOptions
from siglane.settings.options import CommandOptions
from siglane.settings.tagging import TagSettings

SETTINGS = ("batch_size", "attention", "dtype", "quantization", "device", "max_num_patches")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedOptions(CommandOptions):
    COMMAND = "embed"

    text: tuple[str, ...] = field(default=(), metadata={"help": "texts, embedded as they are"})
    output: Path | None = field(
        default=None, metadata={"help": "a safetensors file: images [I, D] and texts [T, D], float32", "short": "-o"}
    )
    json: bool = field(default=False, metadata={"help": "print the vectors as one JSON list"})

    def __post_init__(self) -> None:
        if self.output is None and not self.json:
            raise UserError("nowhere to put the vectors; give --output or --json", code="bad_option")


ARGUMENTS = (MODEL_ARGUMENT, Argument("images", "IMAGE", "pictures: paths or URLs", nargs="*"))
OPTIONS = (
    OptionGroup(EmbedOptions, "embed"),
    OptionGroup(TagSettings, "model of both towers", only=SETTINGS),
    MODEL,
    IMAGES,
)


def run(arguments: argparse.Namespace, out: TextIO) -> int:
    options = read_options(EmbedOptions, arguments)
    if not (arguments.images or options.text):
        raise UserError("there is nothing to embed; name pictures, or give --text", code="bad_option")
    if options.output is not None:
        check_writable(options.output)
    settings = read_options(TagSettings, arguments)

    from siglane.tagging.tagger import Tagger

    tagger = Tagger.from_settings(
        settings,
        revision=read_options(ModelOptions, arguments).revision,
        decode=read_options(DecodeOptions, arguments).local,
    )
    tensors = {"images": tagger.embed_images(arguments.images), "texts": tagger.embed_texts(options.text)}
    if options.output is not None:
        write_tensors({name: tensor for name, tensor in tensors.items() if len(tensor)}, options.output)
    if options.json:
        names = [*({"image": image} for image in arguments.images), *({"text": text} for text in options.text)]
        vectors = [*tensors["images"].tolist(), *tensors["texts"].tolist()]
        emit_json([name | {"embedding": vector} for name, vector in zip(names, vectors, strict=True)], out)
    else:
        count, width = len(arguments.images) + len(options.text), tensors["texts"].shape[1]
        emit_line(f"{options.output}: {count} vectors of {width}", out)
    return 0
