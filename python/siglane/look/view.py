"""The picture that `siglane look` draws: the source with its tiles, what the tower gets, what the prompt becomes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, assert_never

import numpy as np
import numpy.typing as npt
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
    badge,
    colour_of,
    counted,
    flow,
    folded,
    folds,
    font,
    framed,
    line_feed,
    printable,
    stacked,
    text_at,
    with_grid,
)
from siglane.types import (
    AnyRes,
    Grid,
    ImageLayout,
    ImagePlaceholder,
    Indicator,
    Marker,
    MergedScales,
    Newline,
    Pad,
    Resize,
    Size,
    Tile,
    Token,
)

Pixels = npt.NDArray[np.uint8]

MARGIN, GUTTER, COLUMN = 56, 64, 760
TILE_GAP, GROUP_GAP, LARGEST_TILE = 10, 40, 560
FACT_ROW, INDENT, SKETCH = 34, 120, 96
RESIZES: dict[PositionResize, str] = {
    "never": "as they are",
    "bilinear_antialias": "bilinear, antialiased",
    "bicubic": "bicubic",
}


@dataclass(frozen=True, slots=True)
class Positions:
    """learned: the grid of the tower's position table; resize: how it is brought to other grids; rotary: whether
    every block turns queries and keys by row and column too."""

    learned: Grid
    resize: PositionResize
    rotary: bool


@dataclass(frozen=True, slots=True)
class View:
    """Everything the drawing shows. frames: u8 `[H, W, 3]`, the upright picture, or those of a video; tiles: u8
    `[H, W, 3]`, one per tile of the layout, exactly as the tower gets it; speaks: whether there is a prompt."""

    name: str
    model: str
    frames: tuple[Pixels, ...]
    layout: ImageLayout
    tiles: tuple[Pixels, ...]
    patch_size: int
    positions: Positions
    speaks: bool


def draw(view: View) -> Image.Image:
    """One page: header, source and tiles side by side, prompt below."""
    left = stacked([_source(view), _facts(view)], COLUMN, GROUP_GAP)
    right, prompt = _tile_groups(view), _prompt(_chips(view), 2 * COLUMN + GUTTER)
    top = MARGIN + 128
    body = max(left.height, right.height)
    page = Image.new("RGB", (2 * (MARGIN + COLUMN) + GUTTER, top + body + 88 + prompt.height + MARGIN), PAPER)
    pen = ImageDraw.Draw(page)
    _header(pen, view)
    page.paste(left, (MARGIN, top))
    page.paste(right, (MARGIN + COLUMN + GUTTER, top))
    below = top + body + 36
    pen.line([(MARGIN, below), (page.width - MARGIN, below)], LINE, 2)
    medium = "video" if view.layout.frames else "picture"
    becomes = f"In the prompt the {medium} becomes" if view.speaks else "The tower gives"
    text_at(pen, (MARGIN, below + 14), becomes, 20, MUTED)
    page.paste(prompt, (MARGIN, below + 52))
    return page


def unpatchify(pixels: npt.NDArray[Any], grids: Sequence[Grid], patch_size: int, channel_first: bool) -> list[Pixels]:
    """The inverse of `image.patchify.patchify`: patch rows back to u8 `[H, W, 3]` tiles."""
    p = patch_size
    tiles = []
    start = 0
    for h, w in grids:
        rows = pixels[start : start + h * w]
        shaped = rows.reshape(h, w, 3, p, p).transpose(0, 3, 1, 4, 2) if channel_first else None
        if shaped is None:
            shaped = rows.reshape(h, w, p, p, 3).transpose(0, 2, 1, 3, 4)
        tiles.append(np.clip(np.rint(shaped.reshape(h * p, w * p, 3)), 0, 255).astype(np.uint8))
        start += h * w
    return tiles


def _header(pen: ImageDraw.ImageDraw, view: View) -> None:
    layout = view.layout
    text_at(pen, (MARGIN, MARGIN - 8), printable(view.name), 38, INK, bold=True)
    facts = [
        f"{layout.source.width} x {layout.source.height} pixels",
        *([counted(layout.frames, "frame")] if layout.frames else []),
        counted(len(layout.tiles), "tile"),
        counted(layout.patches, "patch", "patches"),
        counted(layout.image_tokens, "image token" if view.speaks else "row"),
        f"as {printable(view.model)} sees it",
    ]
    x = MARGIN
    for number, fact in enumerate(facts):
        if number:
            text_at(pen, (x + 12, MARGIN + 50), "·", 24, MUTED)
            x += 30
        strong = number == len(facts) - 2
        text_at(pen, (x, MARGIN + 50), fact, 24, INK if strong else MUTED, bold=strong)
        x += int(font(24).getlength(fact)) + 2


def _source(view: View) -> Image.Image:
    """The upright picture, on the canvas it is put on, with the tiles of its finest canvas drawn where they lie."""
    tiles = view.layout.tiles
    finest = max((tile.canvas for tile in tiles), key=lambda canvas: canvas.width * canvas.height)
    shown = [(number, tile) for number, tile in enumerate(tiles) if tile.canvas == finest and tile.frame == 0]
    across, down, (left, top, right, bottom) = _canvas(shown[0][1], view.layout.source)
    pieces = folds(across, down, COLUMN)
    scale = min(COLUMN * pieces / max(across, down), COLUMN / min(across, down))
    width, height = max(1, round(across * scale)), max(1, round(down * scale))
    canvas = Image.new("RGB", (width, height), _fill(shown[0][1]))
    size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    picture = Image.fromarray(view.frames[0]).resize(size, Image.Resampling.LANCZOS)
    canvas.paste(picture, (round(left * scale), round(top * scale)))
    boxes = {number: _placed(tile, view.patch_size, canvas.size) for number, tile in shown}
    for number, tile in shown:
        canvas = with_grid(canvas, boxes[number], tile.grid)
    pen = ImageDraw.Draw(canvas)
    for number, box in boxes.items():
        framed(pen, box, number)
    for number, box in boxes.items():
        badge(pen, box, number)
    title = "The first frame" if view.layout.frames else "The picture, upright"
    if any(isinstance(step, Pad) for step in shown[0][1].steps):
        title += ", on the canvas it is put on"
    if pieces > 1:
        canvas = folded(canvas, -(-max(canvas.size) // pieces))
        title += f", folded into {pieces} {'rows' if width > height else 'columns'}"
    panel = Image.new("RGB", (COLUMN, 44 + canvas.height), PAPER)
    text_at(ImageDraw.Draw(panel), (0, 0), title, 20, MUTED)
    panel.paste(canvas, (0, 44))
    return panel


def _canvas(tile: Tile, source: Size) -> tuple[float, float, tuple[float, float, float, float]]:
    """Width and height of a tile's canvas in source pixels, and the box of the picture on it."""
    box, canvas = (0.0, 0.0, float(source.width), float(source.height)), source
    for step in tile.steps:
        match step:
            case Resize(size):
                x, y = size.width / canvas.width, size.height / canvas.height
                box = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
            case Pad(size, left, top):
                box = (box[0] + left, box[1] + top, box[2] + left, box[3] + top)
        canvas = step.size
    x, y = source.width / (box[2] - box[0]), source.height / (box[3] - box[1])
    return canvas.width * x, canvas.height * y, (box[0] * x, box[1] * y, box[2] * x, box[3] * y)


def _fill(tile: Tile) -> Rgb:
    """The colour around the picture."""
    return next((step.fill for step in reversed(tile.steps) if isinstance(step, Pad)), WHITE)


def _facts(view: View) -> Image.Image:
    """How positions and tokens come about, in a few lines."""
    positions, grids = view.positions, list(dict.fromkeys(view.layout.grids))
    shapes = ", ".join(f"{grid.h} x {grid.w}" for grid in grids[:4]) + (", ..." if len(grids) > 4 else "")
    learned = f"{positions.learned.h} x {positions.learned.w} learned positions"
    resized = grids != [positions.learned]
    how = f"resized to {shapes} ({RESIZES[positions.resize]})" if resized else "one for each patch"
    rotary = ["and rotary positions by row and column in every block"] if positions.rotary else []
    panels = [
        _fact("patches", [f"{view.patch_size} x {view.patch_size} pixels; {shapes} of them (rows x columns)"]),
        _fact("positions", [f"{learned}, {how}", *rotary]),
        *([_position_sketch(positions.learned, grids[-1])] if resized else []),
        _fact("tokens" if view.speaks else "rows", _token_lines(view.layout)),
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


def _token_lines(layout: ImageLayout) -> list[str]:
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
        case Newline():
            text = f"{parts} x {(total - 1) // tiles:,} + a newline = {total:,}"
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


def _tile_groups(view: View) -> Image.Image:
    """Every tile in the tower's order, pulled apart, one block for each canvas the picture was resized to."""
    groups = list(_groups(view.layout))
    widest = max(columns for _, columns, _ in groups)
    shape = max((tile.grid for tile in view.layout.tiles), key=lambda grid: grid.w / grid.h)
    side = min(LARGEST_TILE if len(view.tiles) > 1 else COLUMN, (COLUMN - (widest - 1) * TILE_GAP) // widest)
    scale = side / (shape.w * view.patch_size)
    blocks = [_block(view, tiles, columns, canvas, scale) for tiles, columns, canvas in groups]
    places, height = flow([block.size for block in blocks], COLUMN, GROUP_GAP)
    panel = Image.new("RGB", (COLUMN, height), PAPER)
    for place, block in zip(places, blocks, strict=True):
        panel.paste(block, place)
    return panel


def _groups(layout: ImageLayout) -> Iterator[tuple[list[int], int, Size]]:
    """(tile numbers, tiles per row, canvas) of each run of tiles cut from one canvas of one frame."""
    drawn = [(tile.frame, tile.canvas) for tile in layout.tiles]
    if layout.frames and len(set(drawn)) == len(drawn):  # one tile per frame: frames follow each other as tiles do
        columns = min(len(drawn), max(1, round((1.3 * len(drawn)) ** 0.5)))
        yield list(range(len(drawn))), columns, drawn[0][1]
        return
    for (_, canvas), run in groupby(range(len(drawn)), key=lambda number: drawn[number]):
        numbers = list(run)
        yield numbers, len({layout.tiles[number].box.left for number in numbers}), canvas


def _block(view: View, numbers: list[int], columns: int, canvas: Size, scale: float) -> Image.Image:
    first, tile = view.tiles[numbers[0]], view.layout.tiles[numbers[0]]
    pieces = folds(first.shape[1], first.shape[0], COLUMN) if len(numbers) == 1 else 1
    if pieces > 1:
        scale = COLUMN * pieces / max(first.shape[:2])
    width, height = max(8, round(first.shape[1] * scale)), max(8, round(first.shape[0] * scale))
    if len(numbers) == 1 and pieces == 1 and height > COLUMN:
        width, height = max(8, round(width * COLUMN / height)), COLUMN
    drawn = [_drawn(view, number, (width, height)) for number in numbers]
    title = _title(view.layout, numbers, columns, canvas)
    if pieces > 1:
        cells = max(tile.grid)
        drawn = [folded(drawn[0], round(-(-cells // pieces) * max(width, height) / cells))]
        title += f", folded into {pieces} {'rows' if width > height else 'columns'}"
    width, height = drawn[0].size
    rows = -(-len(numbers) // columns)
    across = columns * (width + TILE_GAP) - TILE_GAP
    block = Image.new("RGB", (max(across, int(font(20).getlength(title)) + 4), 44 + rows * (height + TILE_GAP)), PAPER)
    text_at(ImageDraw.Draw(block), (0, 0), title, 20, MUTED)
    for place, panel in enumerate(drawn):
        x, y = place % columns * (width + TILE_GAP), place // columns * (height + TILE_GAP)
        block.paste(panel, (x, 44 + y))
    return block


def _title(layout: ImageLayout, numbers: Sequence[int], columns: int, canvas: Size) -> str:
    grid = layout.tiles[numbers[0]].grid
    frames = {layout.tiles[number].frame for number in numbers}
    if len(frames) > 1:
        return f"Each frame resized to {canvas.width} x {canvas.height}: {grid.w} x {grid.h} patches"
    frame = f"Frame {min(frames) + 1}, resized" if layout.frames else "Resized"
    cut = f"{columns} x {-(-len(numbers) // columns)} tiles of " if len(numbers) > 1 else ""
    padded = "and padded to" if isinstance(layout.tiles[numbers[0]].steps[-1], Pad) else "to"
    return f"{frame} {padded} {canvas.width} x {canvas.height}: {cut}{grid.w} x {grid.h} patches"


def _drawn(view: View, number: int, size: tuple[int, int]) -> Image.Image:
    pixels = Image.fromarray(view.tiles[number])
    enlarged = size[0] > pixels.width  # then show the pixels as they are: the model has no more
    picture = pixels.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)
    picture = with_grid(picture, (0, 0, *size), view.layout.tiles[number].grid)
    pen = ImageDraw.Draw(picture)
    framed(pen, (0, 0, *size), number)
    badge(pen, (0, 0, *size), number)
    return picture


@dataclass(frozen=True, slots=True)
class _Chip:
    """One piece of the prompt, its line feeds as signs. fill, edge: colours, None for none."""

    text: str
    ink: Rgb
    fill: Rgb | None
    edge: Rgb | None


def _chips(view: View) -> list[_Chip]:
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
                chips.append(_Chip(label + counted(rows, noun), WHITE, colour, None))
                number += 1
            case Indicator(index):
                chips.append(_Chip(f"learned row {index}", INK, LINE, None))
            case Token(text):
                chips.append(_Chip(printable(text), colour, None, colour))
            case Marker(text, isolated):
                chips.append(_Chip("".join(map(_seen, text)), MUTED, None, MUTED if isolated else LINE))
            case _:
                assert_never(piece)
    return chips


def _seen(letter: str) -> str:
    """A line feed stays one, for `_prompt` to draw; anything else as the font can show it."""
    return letter if letter == "\n" else printable(repr(letter)[1:-1])


def _prompt(chips: Sequence[_Chip], width: int) -> Image.Image:
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


def _placed(tile: Tile, patch_size: int, size: tuple[int, int]) -> Rectangle:
    """Where a tile's patches lie on the same picture at another size; what no patch covers is not read."""
    x, y = size[0] / tile.canvas.width, size[1] / tile.canvas.height
    left, top = tile.box.left, tile.box.top
    right, bottom = left + tile.grid.w * patch_size, top + tile.grid.h * patch_size
    return round(left * x), round(top * y), round(right * x), round(bottom * y)
