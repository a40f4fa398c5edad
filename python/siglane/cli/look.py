"""`siglane look`: draws on a picture what the model sees of it. Loads no weights."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from siglane.cli.common import BUDGET, IMAGES, MODEL, MODEL_ARGUMENT, Argument, checkpoint_of, load_image_processor
from siglane.cli.output import check_writable, emit_json, emit_line, writing
from siglane.cli.tokens import describe
from siglane.errors import UserError
from siglane.settings.flags import OptionGroup, read_options
from siglane.settings.media import DecodeOptions
from siglane.settings.options import CommandOptions, option
from siglane.tiling.rule import ImageBudget


@dataclass(frozen=True, slots=True, kw_only=True)
class LookOptions(CommandOptions):
    COMMAND = "look"

    output: Path = option(Path("view.png"), "the drawing, a PNG file", short="-o")
    video: bool = option(False, "IMAGE is a video")
    num_frames: int | None = option(None, "frames of a video that the model sees; none: as its family does")
    json: bool = option(False, "print the numbers as one JSON object")


ARGUMENTS = (MODEL_ARGUMENT, Argument("image", "IMAGE", "a picture, or a video with --video: path or URL"))
OPTIONS = (OptionGroup(LookOptions, "look"), MODEL, IMAGES, BUDGET)


def run(arguments: argparse.Namespace, out: TextIO) -> int:
    options = read_options(LookOptions, arguments)
    decode = read_options(DecodeOptions, arguments).local
    image_limits = read_options(ImageBudget, arguments)
    if options.num_frames is not None and not options.video:
        raise UserError("--num-frames is about a video; give --video too", code="bad_option")
    check_writable(options.output)
    checkpoint = checkpoint_of(arguments)

    from siglane.families.pipeline import MediaPipeline, report_image
    from siglane.families.processor import Processor
    from siglane.look.page import draw
    from siglane.look.seen import view_of
    from siglane.look.words import counted
    from siglane.media.item import MediaItem

    processor = load_image_processor(checkpoint)
    pipeline = MediaPipeline(processor.facts, decode=decode)
    item = MediaItem(arguments.image, "IMAGE", image_limits, video=options.video, frames=options.num_frames)
    pipeline.admit([item])
    pipeline.read(item)
    pipeline.lay_out([item])
    view = view_of(
        item,
        pipeline,
        processor.facts,
        decode,
        name=Path(arguments.image).name[-60:],
        model=Path(arguments.model).name,
        speaks=isinstance(processor, Processor),
    )
    with writing(options.output):
        draw(view).save(options.output, format="PNG")
    if options.json:
        emit_json(describe(arguments.image, report_image(item)) | {"view": str(options.output)}, out)
    else:
        layout = item.layout
        tokens = counted(layout.image_tokens, "image token" if view.speaks else "row")
        emit_line(f"{options.output}: {counted(len(layout.tiles), 'tile')}, {tokens}", out)
    return 0
