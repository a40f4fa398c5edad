"""`siglane look`: draws on a picture what the model sees of it. Loads no weights."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
import numpy.typing as npt

from siglane.cli.common import (
    PictureOptions,
    add_model,
    check_writable,
    checkpoint_of,
    emit_json,
    load_image_processor,
)
from siglane.cli.options import add_options, read_options
from siglane.cli.tokens import describe
from siglane.errors import UserError
from siglane.types import Pad

if TYPE_CHECKING:
    from siglane.types import DecodedImage, ImageLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class LookOptions:
    output: Path = field(default=Path("view.png"), metadata={"help": "the drawing, a PNG file", "short": "-o"})
    json: bool = field(default=False, metadata={"help": "print the numbers as one JSON object"})


def configure(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("image", metavar="IMAGE", help="a picture: path or URL")
    add_options(parser, LookOptions, "look")
    add_options(parser, PictureOptions, "pictures")


def run(arguments: argparse.Namespace, out: TextIO) -> int:
    options = read_options(LookOptions, arguments)
    decode = read_options(PictureOptions, arguments).decode_config()
    check_writable(options.output)

    from siglane.cli.view import View, draw, unpatchify
    from siglane.image.source import MediaPolicy, load_source

    processor = load_image_processor(checkpoint_of(arguments))
    image = load_source(arguments.image, MediaPolicy(allow_private_addresses=True), decode)
    (layout,) = processor.layouts([image.size])
    vision = processor.config.vision
    pixels = processor.patches(image, layout).pixels.numpy()
    tiles = unpatchify(pixels, layout.grids, vision.patch_size, vision.patch_layout == "channel_first")
    view = View(
        name=Path(arguments.image).name[-60:],
        model=Path(arguments.model).name,
        rgb=_as_resized(image, layout),
        layout=layout,
        tiles=tuple(tiles),
        patch_size=vision.patch_size,
    )
    try:
        draw(view).save(options.output, format="PNG")
    except OSError as error:
        raise UserError(f"cannot write {options.output}: {error.strerror}", code="cannot_write") from error
    if options.json:
        emit_json(describe(arguments.image, layout) | {"view": str(options.output)}, out)
    else:
        out.write(f"{options.output}: {len(layout.tiles)} tiles, {layout.image_tokens} prompt tokens\n")
    return 0


def _as_resized(image: DecodedImage, layout: ImageLayout) -> npt.NDArray[np.uint8]:
    """The picture whose sides the tiles' canvas stretches: padded to a square first where the model does that."""
    first = layout.tiles[0].steps[0]
    if not isinstance(first, Pad):
        return image.rgb
    from siglane.image.tile import pad

    return pad(image.rgb, first).astype(np.uint8)
