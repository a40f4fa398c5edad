"""`siglane tokens`: how many prompt tokens pictures take. Reads their headers, loads no weights."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from siglane.cli.common import BUDGET, IMAGES, MODEL, MODEL_ARGUMENT, Argument, checkpoint_of
from siglane.cli.output import emit_json, emit_line
from siglane.errors import ImageError, UserError
from siglane.settings.flags import OptionGroup, read_options
from siglane.settings.media import DecodeOptions
from siglane.settings.options import CommandOptions, option
from siglane.tiling.rule import ImageBudget

if TYPE_CHECKING:
    from siglane.families.pipeline import MediaPipeline
    from siglane.families.report import ImageReport
    from siglane.media.item import MediaItem
    from siglane.types import Medium

SIZE = re.compile(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})(?:x([1-9][0-9]{0,3}))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensOptions(CommandOptions):
    COMMAND = "tokens"

    json: bool = option(False, "print one JSON list")
    together: bool = option(False, "count all pictures as those of one request; otherwise each is alone in its own")
    sizes: tuple[str, ...] = option((), "sizes to count besides the pictures, as 640x480, or 640x480x8 for 8 frames")


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
    checkpoint = checkpoint_of(arguments)

    from siglane.families.pipeline import MediaPipeline, report_image
    from siglane.families.registry import image_facts
    from siglane.media.item import MediaItem

    pipeline = MediaPipeline(image_facts(checkpoint), image_limits, decode=decode)
    items = [MediaItem(path, "IMAGE") for path in arguments.images]
    items += [MediaItem(None, "--sizes", size=_medium(text)) for text in options.sizes]
    pipeline.admit(items)
    if options.together:
        pipeline.lay_out(items)
    failures = [None if options.together else _failure(pipeline, item) for item in items]
    if all(failures) and failures[0] is not None:
        raise failures[0]
    rows = [Row(*row) for row in zip([*arguments.images, *options.sizes], items, failures, strict=True)]
    if options.json:
        emit_json([_described(row) for row in rows], out)
    else:
        first = next(row.item for row in rows if row.failure is None)
        for line in [*applied(report_image(first)), *_table(rows)]:
            emit_line(line, out)
    return 0


class Row(NamedTuple):
    """failure: why the picture cannot be counted, None where `item` is laid out."""

    name: str
    item: MediaItem
    failure: ImageError | None


def _failure(pipeline: MediaPipeline, item: MediaItem) -> ImageError | None:
    """Lays out one picture, alone in its request."""
    try:
        pipeline.lay_out([item])
    except ImageError as error:
        return error
    return None


def _medium(text: str) -> Medium:
    from siglane.types import Size, VideoSize

    found = SIZE.fullmatch(text)
    if found is None:
        raise UserError(f"--sizes {text!r} is not a size; write width x height as 640x480", code="bad_option")
    size = Size(int(found[1]), int(found[2]))
    return VideoSize(size, int(found[3])) if found[3] else size


def _described(row: Row) -> dict[str, Any]:
    from siglane.families.pipeline import report_image

    if row.failure is not None:
        return {"image": row.name, "error": row.failure.message}
    return describe(row.name, report_image(row.item))


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


def _table(rows: Sequence[Row]) -> Iterator[str]:
    yield f"{'tokens':>8} {'tiles':>6} {'patches':>8} {'size':>11}  image"
    layouts = []
    for name, item, failure in rows:
        if failure is not None:
            yield f"{'error':>8} {'':>6} {'':>8} {'':>11}  {name}: {failure.message}"
            continue
        layouts.append(layout := item.layout)
        size = f"{layout.source.width}x{layout.source.height}"
        yield f"{layout.image_tokens:>8} {len(layout.tiles):>6} {layout.patches:>8} {size:>11}  {name}"
    if len(layouts) > 1:
        tokens, patches = sum(layout.image_tokens for layout in layouts), sum(layout.patches for layout in layouts)
        tiles = sum(len(layout.tiles) for layout in layouts)
        yield f"{tokens:>8} {tiles:>6} {patches:>8} {'':>11}  {len(layouts)} images"
