"""The source with its tiles where they lie, and the tiles as the tower gets them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from PIL import Image, ImageDraw

from siglane.look.drawing import (
    MUTED,
    PAPER,
    WHITE,
    Rectangle,
    Rgb,
    badge,
    flow,
    folded,
    folds,
    font,
    framed,
    text_at,
    with_grid,
)
from siglane.look.view import COLUMN, GROUP_GAP, View
from siglane.types import ImageLayout, Pad, Resize, Size, Tile

TILE_GAP, LARGEST_TILE = 10, 560


def source_panel(view: View) -> Image.Image:
    """The upright picture, on the canvas it is put on, with the tiles of its finest canvas drawn where they lie."""
    tiles = view.layout.tiles
    finest = max((tile.canvas for tile in tiles), key=lambda canvas: canvas.width * canvas.height)
    shown = [(number, tile) for number, tile in enumerate(tiles) if tile.canvas == finest and tile.frame == 0]
    across, down, (left, top, right, bottom) = canvas_in_source(shown[0][1], view.layout.source)
    pieces = folds(across, down, COLUMN)
    scale = min(COLUMN * pieces / max(across, down), COLUMN / min(across, down))
    width, height = max(1, round(across * scale)), max(1, round(down * scale))
    canvas = Image.new("RGB", (width, height), _fill(shown[0][1]))
    size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    picture = Image.fromarray(view.frames[0]).resize(size, Image.Resampling.LANCZOS)
    canvas.paste(picture, (round(left * scale), round(top * scale)))
    boxes = {number: _placed(tile, view.vision.patch_size, canvas.size) for number, tile in shown}
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


def canvas_in_source(tile: Tile, source: Size) -> tuple[float, float, tuple[float, float, float, float]]:
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


def tile_panel(view: View) -> Image.Image:
    """Every tile in the tower's order, pulled apart, one block for each canvas the picture was resized to."""
    groups = list(_groups(view.layout))
    widest = max(columns for _, columns, _ in groups)
    shape = max((tile.grid for tile in view.layout.tiles), key=lambda grid: grid.w / grid.h)
    side = min(LARGEST_TILE if len(view.tiles) > 1 else COLUMN, (COLUMN - (widest - 1) * TILE_GAP) // widest)
    scale = side / (shape.w * view.vision.patch_size)
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


def _placed(tile: Tile, patch_size: int, size: tuple[int, int]) -> Rectangle:
    """Where a tile's patches lie on the same picture at another size; what no patch covers is not read."""
    x, y = size[0] / tile.canvas.width, size[1] / tile.canvas.height
    left, top = tile.box.left, tile.box.top
    right, bottom = left + tile.grid.w * patch_size, top + tile.grid.h * patch_size
    return round(left * x), round(top * y), round(right * x), round(bottom * y)
