"""`siglane tokens`: how many prompt tokens pictures take. Reads their headers, loads no weights."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from siglane.cli.common import BUDGET, IMAGES, MODEL, MODEL_ARGUMENT, Argument, checkpoint_of, emit_json
from siglane.errors import UserError
from siglane.settings.flags import OptionGroup, read_options
from siglane.settings.media import DecodeOptions
from siglane.settings.options import CommandOptions
from siglane.tiling.rule import ImageBudget

if TYPE_CHECKING:
    from siglane.families.report import ImageReport
    from siglane.types import ImageLayout, Medium

SIZE = re.compile(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})(?:x([1-9][0-9]{0,3}))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensOptions(CommandOptions):
    COMMAND = "tokens"

    json: bool = field(default=False, metadata={"help": "print one JSON list"})
    together: bool = field(
        default=False,
        metadata={"help": "count all pictures as those of one request; otherwise each is alone in its own"},
    )
    sizes: tuple[str, ...] = field(
        default=(), metadata={"help": "sizes to count besides the pictures, as 640x480, or 640x480x8 for 8 frames"}
    )


ARGUMENTS = (
    MODEL_ARGUMENT,
    Argument("images", "IMAGE", "pictures: paths or URLs; only their headers are read", nargs="*"),
)
OPTIONS = (OptionGroup(TokensOptions, "tokens"), MODEL, IMAGES, BUDGET)


def run(arguments: argparse.Namespace, out: TextIO) -> int:
    options = read_options(TokensOptions, arguments)
    if not arguments.images and not options.sizes:
        raise UserError("no pictures; give IMAGE files or --sizes", code="bad_option")
    decode = read_options(DecodeOptions, arguments).local
    image_limits = read_options(ImageBudget, arguments)

    # nothing here needs torch or transformers: a folder is counted before they would have been imported
    from siglane.families.pipeline import MediaPipeline, report_image
    from siglane.families.registry import image_facts
    from siglane.media.item import MediaItem

    pipeline = MediaPipeline(image_facts(checkpoint_of(arguments)), image_limits, decode=decode)
    items = [MediaItem(path, "IMAGE") for path in arguments.images]
    items += [MediaItem(None, "--sizes", size=_medium(text)) for text in options.sizes]
    pipeline.admit(items)
    for group in [items] if options.together else [[item] for item in items]:
        pipeline.lay_out(group)
    layouts, reports = [item.layout for item in items], list(map(report_image, items))
    names = [*arguments.images, *options.sizes]
    if options.json:
        emit_json([describe(*pair) for pair in zip(names, reports, strict=True)], out)
    else:
        out.writelines(line + "\n" for line in [*applied(reports[0]), *_table(names, layouts)])
    return 0


def _medium(text: str) -> Medium:
    from siglane.types import Size, VideoSize

    found = SIZE.fullmatch(text)
    if found is None:
        raise UserError(f"--sizes {text!r} is not a size; write width x height as 640x480", code="bad_option")
    size = Size(int(found[1]), int(found[2]))
    return VideoSize(size, int(found[3])) if found[3] else size


def describe(name: str, report: ImageReport) -> dict[str, Any]:
    """One row of the JSON list. tiles: their number; grids: rows and columns of patches of each; detail, limits: the
    budget that was asked for and applied."""
    return {"image": name, "image_tokens": report["tokens"]} | {
        key: report[key] for key in ("tiles", "grids", "detail", "limits")
    }


def applied(report: ImageReport) -> list[str]:
    """One line that says what a budget came to; none when none was given."""
    detail, limits = report["detail"], report["limits"]
    if detail["requested"] == "auto" and not limits:
        return []
    named = [f"{name} {value}" for name, value in limits.items()]
    return [f"detail {detail['requested']}, applied as {detail['applied']}; limits: {', '.join(named) or 'none'}"]


def _table(names: Sequence[str], layouts: Sequence[ImageLayout]) -> list[str]:
    lines = [f"{'tokens':>8} {'tiles':>6} {'patches':>8} {'size':>11}  image"]
    for name, layout in zip(names, layouts, strict=True):
        size = f"{layout.source.width}x{layout.source.height}"
        lines.append(f"{layout.image_tokens:>8} {len(layout.tiles):>6} {layout.patches:>8} {size:>11}  {name}")
    if len(layouts) > 1:
        tokens, patches = sum(layout.image_tokens for layout in layouts), sum(layout.patches for layout in layouts)
        tiles = sum(len(layout.tiles) for layout in layouts)
        lines.append(f"{tokens:>8} {tiles:>6} {patches:>8} {'':>11}  {len(layouts)} images")
    return lines
