"""`siglane tokens`: how many prompt tokens pictures take. Reads their headers, loads no weights."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from siglane.cli.common import PictureOptions, add_model, checkpoint_of, emit_json
from siglane.cli.options import add_options, read_options
from siglane.errors import UserError

if TYPE_CHECKING:
    from siglane.types import ImageLayout, Size

SIZE = re.compile(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensOptions:
    json: bool = field(default=False, metadata={"help": "print one JSON list"})
    together: bool = field(
        default=False,
        metadata={"help": "count all pictures as those of one request; otherwise each is alone in its own"},
    )
    sizes: tuple[str, ...] = field(default=(), metadata={"help": "sizes to count besides the pictures, as 640x480"})


def configure(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="picture files; only their headers are read")
    add_options(parser, TokensOptions, "tokens")
    add_options(parser, PictureOptions, "pictures")


def run(arguments: argparse.Namespace, out: TextIO) -> int:
    options = read_options(TokensOptions, arguments)
    if not arguments.images and not options.sizes:
        raise UserError("no pictures; give IMAGE files or --sizes", code="bad_option")
    decode = read_options(PictureOptions, arguments).decode_config()

    # nothing here needs torch or transformers: a folder is counted before they would have been imported
    from siglane.families.registry import layouts_of
    from siglane.image.decode import read_size_of_file

    layouts_in = layouts_of(checkpoint_of(arguments))
    sizes = [read_size_of_file(path, decode) for path in arguments.images] + [_size(text) for text in options.sizes]
    groups = [sizes] if options.together else [[size] for size in sizes]
    layouts = [layout for group in groups for layout in layouts_in(group)]
    names = [*arguments.images, *options.sizes]
    if options.json:
        emit_json([describe(*pair) for pair in zip(names, layouts, strict=True)], out)
    else:
        out.writelines(line + "\n" for line in _table(names, layouts))
    return 0


def _size(text: str) -> Size:
    from siglane.types import Size

    found = SIZE.fullmatch(text)
    if found is None:
        raise UserError(f"--sizes {text!r} is not a size; write width x height as 640x480", code="bad_option")
    return Size(int(found[1]), int(found[2]))


def describe(name: str, layout: ImageLayout) -> dict[str, Any]:
    """One row of the JSON list. tiles: their number; grids: rows and columns of patches of each."""
    return {
        "image": name,
        "image_tokens": layout.image_tokens,
        "tiles": len(layout.tiles),
        "grids": [list(grid) for grid in layout.grids],
    }


def _table(names: Sequence[str], layouts: Sequence[ImageLayout]) -> list[str]:
    lines = [f"{'tokens':>8} {'tiles':>6} {'patches':>8} {'size':>11}  image"]
    for name, layout in zip(names, layouts, strict=True):
        size = f"{layout.source.width}x{layout.source.height}"
        lines.append(f"{layout.image_tokens:>8} {len(layout.tiles):>6} {layout.patches:>8} {size:>11}  {name}")
    if len(layouts) > 1:
        tokens, tiles, patches = (sum(values) for values in zip(*map(_counts, layouts), strict=True))
        lines.append(f"{tokens:>8} {tiles:>6} {patches:>8} {'':>11}  {len(layouts)} images")
    return lines


def _counts(layout: ImageLayout) -> tuple[int, int, int]:
    return layout.image_tokens, len(layout.tiles), layout.patches
