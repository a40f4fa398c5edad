"""In words: how positions and tokens come about, and what the prompt becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import assert_never

from PIL import Image, ImageDraw

from siglane.config.vision import PositionResize
from siglane.look.drawing import (
    INK,
    LINE,
    MUTED,
    PAPER,
    WHITE,
    Rectangle,
    Rgb,
    colour_of,
    flow,
    font,
    line_feed,
    printable,
    stacked,
    text_at,
    with_grid,
)
from siglane.look.view import COLUMN, View
from siglane.look.words import counted
from siglane.types import (
    AnyRes,
    Grid,
    ImageLayout,
    ImagePlaceholder,
    Indicator,
    Marker,
    MergedFirst,
    MergedScales,
    Newline,
    Size,
    Token,
)

FACT_ROW, INDENT, SKETCH = 34, 120, 96
RESIZES: dict[PositionResize, str] = {
    "never": "as they are",
    "bilinear_antialias": "bilinear, antialiased",
    "bicubic": "bicubic",
    "bucketised": "each the learned one at its place",
}


def facts_panel(view: View) -> Image.Image:
    """How positions and tokens come about, in a few lines."""
    vision, grids = view.vision, list(dict.fromkeys(view.layout.grids))
    shapes = ", ".join(f"{grid.h} x {grid.w}" for grid in grids[:4]) + (", ..." if len(grids) > 4 else "")
    known = vision.position_grid
    resized = known.area > 0 and grids != [known]
    how = f"resized to {shapes} ({RESIZES[vision.position_resize]})" if resized else "one for each patch"
    learned = [f"{known.h} x {known.w} learned positions, {how}"] if known.area else []
    rotary = [] if vision.rope_theta is None else ["rotary positions by row and column in every block"]
    panels = [
        _fact("patches", [f"{vision.patch_size} x {vision.patch_size} pixels; {shapes} of them (rows x columns)"]),
        _fact("positions", learned + [f"{'and ' * bool(learned)}{one}" for one in rotary]),
        *([_position_sketch(vision.position_grid, grids[-1])] if resized else []),
        _fact("tokens" if view.speaks else "rows", token_lines(view.layout)),
    ]
    return stacked(panels, COLUMN, 0)


def _fact(label: str, lines: Sequence[str]) -> Image.Image:
    panel = Image.new("RGB", (COLUMN, FACT_ROW * len(lines)), PAPER)
    pen = ImageDraw.Draw(panel)
    text_at(pen, (0, 0), label, 20, MUTED)
    for number, line in enumerate(lines):
        text_at(pen, (INDENT, FACT_ROW * number), line, 20, INK)
    return panel


def _position_sketch(learned: Grid, grid: Grid) -> Image.Image:
    """The position table beside the shape it is resized to, both at one scale."""
    scale = min(SKETCH / max(learned.h, grid.h), (COLUMN - INDENT - 130) / (learned.w + grid.w))
    sketch = Image.new("RGB", (COLUMN, SKETCH + 24), PAPER)
    pen = ImageDraw.Draw(sketch)
    x = INDENT
    for place, one in enumerate((learned, grid)):
        width, height = max(3, round(one.w * scale)), max(3, round(one.h * scale))
        top = 4 + (SKETCH - height) // 2
        panel = with_grid(Image.new("RGB", (width + 1, height + 1), WHITE), (0, 0, width, height), one)
        sketch.paste(panel, (x, top))
        pen.rectangle((x, top, x + width, top + height), outline=MUTED if place == 0 else colour_of(0), width=1)
        x += width + 18
        if place == 0:
            middle = 4 + SKETCH // 2
            pen.line([(x, middle), (x + 34, middle)], MUTED, 2)
            pen.line([(x + 27, middle - 6), (x + 34, middle), (x + 27, middle + 6)], MUTED, 2)
            x += 52
    return sketch


def token_lines(layout: ImageLayout) -> list[str]:
    """Where the image tokens come from: per tile, then in all; then what else the picture puts into the prompt."""
    total, tiles = layout.image_tokens, len(layout.tiles)
    parts = counted(tiles, "frame" if layout.frames else "tile")
    features = [piece.rows for piece in layout.pieces if isinstance(piece, ImagePlaceholder)]
    match layout.assembly:
        case MergedScales(sides) if sides:
            last = layout.arrangement.area
            text = f"{counted(last, 'tile')} of the last scale x {total // last:,} = {total:,}, all scales in each"
        case AnyRes(crop, resized):
            map_rows = resized or Grid(crop.bottom - crop.top, crop.right - crop.left)
            tiled = map_rows.h * (map_rows.w + 1)
            text = (
                f"{total - tiled:,} of the whole picture + {map_rows.h} rows of {map_rows.w} and a newline = {total:,}"
            )
        case Newline() as ends:
            newlines = ends.count(tiles, layout.projected[0])
            added = f" + {'a newline' if newlines == 1 else f'{newlines:,} newlines'}" if newlines else ""
            text = f"{parts} x {(total - newlines) // tiles:,}{added} = {total:,}"
        case MergedFirst(kept=bytes(kept)) if 0 in kept:
            text = f"{parts} x {len(kept) // tiles:,}, {kept.count(0):,} that stand still left out = {total:,}"
        case _:
            same = tiles > 1 and len(set(features)) == 1 and (len(features) == tiles or tiles == layout.frames)
            text = f"{parts} x {total // tiles:,} = {total:,}" if same else f"{total:,}"
    markers = [piece for piece in layout.pieces if isinstance(piece, Marker)]
    others = {
        ("learned row", "learned rows"): sum(isinstance(piece, Indicator) for piece in layout.pieces),
        ("special token", "special tokens"): sum(isinstance(piece, Token) for piece in layout.pieces),
        ("token of its own", "tokens of their own"): sum(marker.isolated for marker in markers),
        ("piece of text (light)", "pieces of text (light)"): sum(not marker.isolated for marker in markers),
    }
    beside = [counted(count, *nouns) for nouns, count in others.items() if count]
    return [text, *([f"beside them {', '.join(beside)}"] if beside else [])]


@dataclass(frozen=True, slots=True)
class Chip:
    """One piece of the prompt, its line feeds as signs. fill, edge: colours, None for none."""

    text: str
    ink: Rgb
    fill: Rgb | None
    edge: Rgb | None


def chips(view: View) -> list[Chip]:
    """Prompt rows in the colour of the tile they come from, where each piece belongs to one tile."""
    layout, noun = view.layout, "token" if view.speaks else "row"
    per_tile = sum(isinstance(piece, ImagePlaceholder) for piece in layout.pieces) == len(layout.tiles)
    named = "frame" if layout.frames else "tile"
    chips = []
    number = 0
    for piece in layout.pieces:
        colour = colour_of(min(number, len(layout.tiles) - 1)) if per_tile else INK
        match piece:
            case ImagePlaceholder(rows):
                label = f"{named} {number + 1}: " if per_tile and len(layout.tiles) > 1 else ""
                chips.append(Chip(label + counted(rows, noun), WHITE, colour, None))
                number += 1
            case Indicator(index):
                chips.append(Chip(f"learned row {index}", INK, LINE, None))
            case Token(text):
                chips.append(Chip(printable(text), colour, None, colour))
            case Marker(text, isolated):
                chips.append(Chip("".join(map(_seen, text)), MUTED, None, MUTED if isolated else LINE))
            case _:
                assert_never(piece)
    return chips


def _seen(letter: str) -> str:
    """A line feed stays one, for `prompt_panel` to draw; anything else as the font can show it."""
    return letter if letter == "\n" else printable(repr(letter)[1:-1])


def prompt_panel(chips: Sequence[Chip], width: int) -> Image.Image:
    letters = font(20)
    sizes = [Size(sum(_widths(chip.text)) + 28, 38) for chip in chips]
    places, height = flow(sizes, width, 8)
    panel = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(panel)
    for chip, size, (x, y) in zip(chips, sizes, places, strict=True):
        box: Rectangle = (x, y, x + size.width - 1, y + size.height - 1)
        pen.rounded_rectangle(box, 9, chip.fill or PAPER, chip.edge, 2 if chip.edge else 1)
        x += 14
        for part, part_width in zip(_parts(chip.text), _widths(chip.text), strict=True):
            if part == "\n":
                line_feed(pen, (x, y + 9), chip.ink)
            else:
                pen.text((x, y + 7), part, chip.ink, letters)
            x += part_width
    return panel


def _parts(text: str) -> list[str]:
    """Runs of letters, and line feeds one by one."""
    return [part for line_feeds, run in groupby(text, "\n".__eq__) for part in (run if line_feeds else ["".join(run)])]


def _widths(text: str) -> list[int]:
    return [24 if part == "\n" else round(font(20).getlength(part)) for part in _parts(text)]
