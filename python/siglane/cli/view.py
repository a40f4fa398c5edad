"""The picture that `siglane look` draws: the source with its tiles, what the tower gets, what the prompt becomes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from siglane.types import Features, Grid, ImageLayout, Marker, Size, Tile

Rgb = tuple[int, int, int]
Pixels = npt.NDArray[np.uint8]
Point = tuple[int, int]

PAPER, INK, MUTED, LINE, WHITE = (250, 250, 248), (28, 32, 38), (108, 114, 124), (222, 222, 218), (255, 255, 255)
# one colour per tile, told apart by neighbours; the thirteenth begins again
COLOURS: tuple[Rgb, ...] = (
    (37, 99, 235),
    (217, 70, 40),
    (5, 150, 105),
    (202, 138, 4),
    (147, 51, 234),
    (8, 145, 178),
    (219, 39, 119),
    (101, 133, 13),
    (79, 70, 229),
    (234, 88, 12),
    (13, 148, 136),
    (120, 90, 70),
)
MARGIN, GUTTER, COLUMN = 56, 64, 760
TILE_GAP, GROUP_GAP, LARGEST_TILE = 10, 40, 560
SMALLEST_CELL = 4  # pixels between grid lines below which the lines would hide the picture
GRID_ALPHA, ALPHA_PER_CELL = 70, 8


@dataclass(frozen=True, slots=True)
class View:
    """Everything the drawing shows. rgb: the picture as it is resized (padded to a square where the model does that);
    tiles: u8 `[H, W, 3]`, one per tile of the layout, exactly as the tower gets it."""

    name: str
    model: str
    rgb: Pixels
    layout: ImageLayout
    tiles: tuple[Pixels, ...]
    patch_size: int


def draw(view: View) -> Image.Image:
    """One page: header, source and tiles side by side, prompt below."""
    source, groups = _source(view), _tile_groups(view)
    chips = _chips(view.layout)
    top = MARGIN + 128
    body = max(source.height, groups.height)
    prompt = _prompt(chips, 2 * COLUMN + GUTTER)
    page = Image.new("RGB", (2 * (MARGIN + COLUMN) + GUTTER, top + body + 88 + prompt.height + MARGIN), PAPER)
    pen = ImageDraw.Draw(page)
    _header(pen, view)
    page.paste(source, (MARGIN, top))
    page.paste(groups, (MARGIN + COLUMN + GUTTER, top))
    below = top + body + 36
    pen.line([(MARGIN, below), (page.width - MARGIN, below)], LINE, 2)
    _text(pen, (MARGIN, below + 14), "In the prompt the picture becomes", 20, MUTED)
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
    _text(pen, (MARGIN, MARGIN - 8), _printable(view.name), 38, INK, bold=True)
    facts = (
        f"{layout.source.width} x {layout.source.height} pixels",
        _counted(len(layout.tiles), "tile"),
        _counted(layout.patches, "patch", "patches"),
        _counted(layout.image_tokens, "prompt token"),
        f"as {_printable(view.model)} sees it",
    )
    x = MARGIN
    for number, fact in enumerate(facts):
        if number:
            _text(pen, (x + 12, MARGIN + 50), "·", 24, MUTED)
            x += 30
        strong = number == 3
        _text(pen, (x, MARGIN + 50), fact, 24, INK if strong else MUTED, bold=strong)
        x += int(_font(24).getlength(fact)) + 2


def _source(view: View) -> Image.Image:
    """The upright picture with the tiles of its finest canvas drawn where they lie on it."""
    size = view.layout.source
    scale = min(COLUMN / size.width, COLUMN / size.height)
    width, height = max(1, round(size.width * scale)), max(1, round(size.height * scale))
    picture = Image.fromarray(view.rgb).resize((width, height), Image.Resampling.LANCZOS)
    finest = max((tile.canvas for tile in view.layout.tiles), key=lambda canvas: canvas.width * canvas.height)
    shown = [(number, tile) for number, tile in enumerate(view.layout.tiles) if tile.canvas == finest]
    panel = Image.new("RGB", (COLUMN, 44 + height), PAPER)
    pen = ImageDraw.Draw(panel)
    _text(pen, (0, 0), "The picture, upright", 20, MUTED)
    boxes = {number: _placed(tile, view.patch_size, picture.size) for number, tile in shown}
    for number, tile in shown:
        picture = _with_grid(picture, boxes[number], tile.grid)
    frames = ImageDraw.Draw(picture)
    for number, box in boxes.items():
        _frame(frames, box, number)
    for number, (left, top, right, bottom) in boxes.items():
        _badge(frames, (left + 8, top + 8), number, min(right - left, bottom - top))
    panel.paste(picture, (0, 44))
    return panel


def _tile_groups(view: View) -> Image.Image:
    """Every tile in the tower's order, pulled apart, one block for each canvas the picture was resized to."""
    groups = list(_groups(view.layout))
    widest = max(columns for _, columns, _ in groups)
    shape = max((tile.grid for tile in view.layout.tiles), key=lambda grid: grid.w / grid.h)
    side = min(LARGEST_TILE if len(view.tiles) > 1 else COLUMN, (COLUMN - (widest - 1) * TILE_GAP) // widest)
    scale = side / (shape.w * view.patch_size)
    blocks = [_block(view, tiles, columns, canvas, scale) for tiles, columns, canvas in groups]
    places, height = _flow([block.size for block in blocks], COLUMN, GROUP_GAP)
    panel = Image.new("RGB", (COLUMN, height), PAPER)
    for place, block in zip(places, blocks, strict=True):
        panel.paste(block, place)
    return panel


def _groups(layout: ImageLayout) -> Iterator[tuple[list[int], int, Size]]:
    """(tile numbers, tiles per row, canvas) of each run of tiles cut from one canvas."""
    for canvas, run in groupby(range(len(layout.tiles)), key=lambda number: layout.tiles[number].canvas):
        numbers = list(run)
        yield numbers, len({layout.tiles[number].box.left for number in numbers}), canvas


def _block(view: View, numbers: list[int], columns: int, canvas: Size, scale: float) -> Image.Image:
    first = view.tiles[numbers[0]]
    width, height = max(8, round(first.shape[1] * scale)), max(8, round(first.shape[0] * scale))
    rows = -(-len(numbers) // columns)
    grid = view.layout.tiles[numbers[0]].grid
    cut = f"{columns} x {rows} tiles of " if len(numbers) > 1 else ""
    title = f"Resized to {canvas.width} x {canvas.height}: {cut}{grid.w} x {grid.h} patches"
    across = columns * (width + TILE_GAP) - TILE_GAP
    block = Image.new("RGB", (max(across, int(_font(20).getlength(title)) + 4), 44 + rows * (height + TILE_GAP)), PAPER)
    _text(ImageDraw.Draw(block), (0, 0), title, 20, MUTED)
    for place, number in enumerate(numbers):
        pixels = Image.fromarray(view.tiles[number])
        enlarged = width > pixels.width  # then show the pixels as they are: the model has no more
        tile = pixels.resize((width, height), Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)
        tile = _with_grid(tile, (0, 0, width, height), view.layout.tiles[number].grid)
        pen = ImageDraw.Draw(tile)
        _frame(pen, (0, 0, width, height), number)
        _badge(pen, (8, 8), number, min(width, height))
        x, y = place % columns * (width + TILE_GAP), place // columns * (height + TILE_GAP)
        block.paste(tile, (x, 44 + y))
    return block


@dataclass(frozen=True, slots=True)
class _Chip:
    """One piece of the prompt: `text` on `colour`, a marker when colour is None."""

    text: str
    colour: Rgb | None


def _chips(layout: ImageLayout) -> list[_Chip]:
    """Prompt rows in the colour of the tile they come from, where each piece belongs to one tile."""
    features = [piece for piece in layout.pieces if isinstance(piece, Features)]
    per_tile = len(features) == len(layout.tiles)
    chips = []
    number = 0
    for piece in layout.pieces:
        match piece:
            case Features(rows):
                label = f"tile {number + 1}: " if per_tile and len(layout.tiles) > 1 else ""
                chips.append(_Chip(label + _counted(rows, "token"), _colour(number) if per_tile else INK))
                number += 1
            case Marker(text, _):
                chips.append(_Chip(_printable(repr(text)[1:-1]), None))
    return chips


def _prompt(chips: Sequence[_Chip], width: int) -> Image.Image:
    font = _font(20)
    sizes = [Size(round(font.getlength(chip.text)) + 28, 38) for chip in chips]
    places, height = _flow(sizes, width, 8)
    panel = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(panel)
    for chip, size, (x, y) in zip(chips, sizes, places, strict=True):
        box = (x, y, x + size.width - 1, y + size.height - 1)
        pen.rounded_rectangle(box, 9, chip.colour or PAPER, None if chip.colour else MUTED)
        _text(pen, (x + 14, y + 7), chip.text, 20, WHITE if chip.colour else MUTED)
    return panel


def _flow(sizes: Sequence[tuple[int, int]], width: int, gap: int) -> tuple[list[Point], int]:
    """Places boxes from left to right, in as many rows as they need -> corners, and the height of it all."""
    places: list[Point] = []
    x = y = tallest = 0
    for box_width, box_height in sizes:
        if x and x + box_width > width:
            x, y, tallest = 0, y + tallest + gap, 0
        places.append((x, y))
        x, tallest = x + box_width + gap, max(tallest, box_height)
    return places, y + tallest


def _placed(tile: Tile, patch_size: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Where a tile's patches lie on the same picture at another size; what no patch covers is not read."""
    x, y = size[0] / tile.canvas.width, size[1] / tile.canvas.height
    left, top = tile.box.left, tile.box.top
    right, bottom = left + tile.grid.w * patch_size, top + tile.grid.h * patch_size
    return round(left * x), round(top * y), round(right * x), round(bottom * y)


def _with_grid(picture: Image.Image, box: tuple[int, int, int, int], grid: Grid) -> Image.Image:
    """Hairlines between the patches, unless they would lie too close."""
    left, top, right, bottom = box
    cell = min((right - left) / grid.w, (bottom - top) / grid.h)
    if cell < SMALLEST_CELL:
        return picture
    alpha = min(GRID_ALPHA, round(ALPHA_PER_CELL * cell))
    veil = Image.new("L", picture.size, 0)
    pen = ImageDraw.Draw(veil)
    for column in range(1, grid.w):
        x = round(left + column * (right - left) / grid.w)
        pen.line([(x, top), (x, bottom - 1)], alpha)
    for row in range(1, grid.h):
        y = round(top + row * (bottom - top) / grid.h)
        pen.line([(left, y), (right - 1, y)], alpha)
    # a line that darkens light patches and lightens dark ones is seen on any picture
    grey = picture.convert("L").point(lambda value: 0 if value > 110 else 255)
    return Image.composite(Image.merge("RGB", (grey, grey, grey)), picture, veil)


def _frame(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], number: int) -> None:
    left, top, right, bottom = box
    pen.rectangle((left, top, right - 1, bottom - 1), outline=_colour(number), width=3)


def _badge(pen: ImageDraw.ImageDraw, corner: Point, number: int, room: int) -> None:
    text = str(number + 1)
    size = max(11, min(22, room // 7))
    width, height = round(_font(size).getlength(text)) + size, round(size * 1.5)
    x, y = corner
    pen.rounded_rectangle((x, y, x + width, y + height), height // 3, _colour(number), WHITE)
    pen.text((x + width / 2, y + height / 2), text, WHITE, _font(size), anchor="mm", stroke_width=0.4)


def _text(pen: ImageDraw.ImageDraw, place: Point, text: str, size: int, colour: Rgb, *, bold: bool = False) -> None:
    pen.text(place, text, colour, _font(size), stroke_width=size / 50 if bold else 0, stroke_fill=colour)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font inside Pillow: no files to find, the same picture on every machine."""
    return ImageFont.load_default(size)


def _colour(number: int) -> Rgb:
    return COLOURS[number % len(COLOURS)]


def _counted(count: int, noun: str, nouns: str | None = None) -> str:
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def _printable(text: str) -> str:
    """Pillow's font has little beyond ASCII."""
    return text.encode("ascii", "replace").decode()
