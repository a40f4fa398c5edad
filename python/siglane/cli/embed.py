"""`siglane embed`: vectors of pictures and texts by a SigLIP with both towers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from siglane.batch.pictures import expand
from siglane.batch.rows import RowFile
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

if TYPE_CHECKING:
    import torch

    from siglane.tagging.tagger import Tagger

SETTINGS = ("batch_size", "attention", "dtype", "quantization", "device", "max_num_patches")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedOptions(CommandOptions):
    COMMAND = "embed"

    text: tuple[str, ...] = field(default=(), metadata={"help": "texts, embedded as they are"})
    output: Path | None = field(
        default=None,
        metadata={
            "help": "a safetensors file: images [I, D] and texts [T, D], float32; or JSON Lines (.jsonl) of pictures, "
            "written as it goes, in which those that are there are skipped",
            "short": "-o",
        },
    )
    json: bool = field(default=False, metadata={"help": "print the vectors as one JSON list"})

    def __post_init__(self) -> None:
        if self.output is None and not self.json:
            raise UserError("nowhere to put the vectors; give --output or --json", code="bad_option")
        if self.as_rows and (self.text or self.json):
            message = "JSON Lines hold pictures alone; leave --text and --json out, or name a .safetensors file"
            raise UserError(message, code="bad_option")

    @property
    def as_rows(self) -> bool:
        return self.output is not None and self.output.suffix.lower() == ".jsonl"


ARGUMENTS = (MODEL_ARGUMENT, Argument("images", "IMAGE", "pictures, folders of pictures, patterns or URLs", nargs="*"))
OPTIONS = (
    OptionGroup(EmbedOptions, "embed"),
    OptionGroup(TagSettings, "model of both towers", only=SETTINGS),
    MODEL,
    IMAGES,
)


def run(arguments: argparse.Namespace, out: TextIO) -> int:
    options = read_options(EmbedOptions, arguments)
    images = [name for given in arguments.images for name in expand(given)]
    if not (images or options.text):
        raise UserError("there is nothing to embed; name pictures, or give --text", code="bad_option")
    if options.output is not None:
        check_writable(options.output)
    if options.as_rows:
        assert options.output is not None
        return _write_rows(images, options.output, arguments, out)
    tagger = _tagger(arguments)
    texts = tagger.embed_texts(options.text)
    if options.output is not None:
        pictures = tagger.embed_images(images)  # a matrix has a row for each, or is not written
        tensors = {"images": pictures, "texts": texts}
        write_tensors({name: tensor for name, tensor in tensors.items() if len(tensor)}, options.output)
        found: list[torch.Tensor | UserError] = list(pictures)
    else:
        found = list(tagger.stream_embeddings(images))
    if options.json:
        errors = [one for one in found if isinstance(one, UserError)]
        if errors and len(errors) == len(images) + len(options.text):
            raise errors[0]
        rows = [_row(name, one) for name, one in zip(images, found, strict=True)]
        rows += [{"text": text, "embedding": one.tolist()} for text, one in zip(options.text, texts, strict=True)]
        emit_json(rows, out)
    else:
        emit_line(f"{options.output}: {len(images) + len(options.text)} vectors of {texts.shape[1]}", out)
    return 0


def _tagger(arguments: argparse.Namespace) -> Tagger:
    from siglane.tagging.tagger import Tagger

    return Tagger.from_settings(
        read_options(TagSettings, arguments),
        **asdict(read_options(ModelOptions, arguments)),
        decode=read_options(DecodeOptions, arguments).local,
    )


def _write_rows(images: Sequence[str], output: Path, arguments: argparse.Namespace, out: TextIO) -> int:
    """Continues the rows of an earlier run. 1 when no picture could be read."""
    with RowFile(output, "image") as file:
        waiting = [name for name in dict.fromkeys(images) if name not in file.known]
        failed = 0
        if waiting:  # else no model is loaded
            for name, one in zip(waiting, _tagger(arguments).stream_embeddings(waiting), strict=True):
                file.append(_row(name, one))
                failed += isinstance(one, UserError)
        there = len(dict.fromkeys(images)) - len(waiting)
        emit_line(f"{output}: {len(waiting) - failed} pictures embedded, {failed} unreadable, {there} were there", out)
    return 1 if waiting and failed == len(waiting) else 0


def _row(name: str, found: torch.Tensor | UserError) -> dict[str, Any]:
    return {"image": name} | (
        {"error": found.message} if isinstance(found, UserError) else {"embedding": found.tolist()}
    )
