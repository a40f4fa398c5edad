"""What pages are drawn from: text, badges, chips, patch grids, long strips folded into rows. Pillow only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from siglane.types import Grid

Rgb = tuple[int, int, int]
Point = tuple[int, int]
Rectangle = tuple[int, int, int, int]

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
SMALLEST_CELL = 4  # pixels between grid lines below which the lines would hide the picture
GRID_ALPHA, ALPHA_PER_CELL = 70, 8
THINNEST, MOST_FOLDS = 40, 12  # a strip drawn thinner is folded, but not into more rows
FOLD_GAP = 10


def text_at(pen: ImageDraw.ImageDraw, place: Point, text: str, size: int, colour: Rgb, *, bold: bool = False) -> None:
    pen.text(place, text, colour, font(size), stroke_width=size / 50 if bold else 0, stroke_fill=colour)


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font inside Pillow: no files to find, the same picture on every machine."""
    return ImageFont.load_default(size)


def colour_of(number: int) -> Rgb:
    return COLOURS[number % len(COLOURS)]


def printable(text: str) -> str:
    """Pillow's font has little beyond ASCII."""
    return text.encode("ascii", "replace").decode()


def flow(sizes: Sequence[tuple[int, int]], width: int, gap: int) -> tuple[list[Point], int]:
    """Places boxes from left to right, in as many rows as they need -> corners, and the height of it all."""
    places: list[Point] = []
    x = y = tallest = 0
    for box_width, box_height in sizes:
        if x and x + box_width > width:
            x, y, tallest = 0, y + tallest + gap, 0
        places.append((x, y))
        x, tallest = x + box_width + gap, max(tallest, box_height)
    return places, y + tallest


def stacked(panels: Sequence[Image.Image], width: int, gap: int) -> Image.Image:
    """Panels below each other."""
    height = sum(panel.height for panel in panels) + gap * (len(panels) - 1)
    page = Image.new("RGB", (width, max(1, height)), PAPER)
    y = 0
    for panel in panels:
        page.paste(panel, (0, y))
        y += panel.height + gap
    return page


def folds(width: float, height: float, room: int) -> int:
    """Into how many pieces a picture is folded so that in `room` pixels its short side can be seen."""
    return min(MOST_FOLDS, -(-int(THINNEST * max(width, height)) // int(room * min(width, height))))


def folded(picture: Image.Image, piece: int) -> Image.Image:
    """A long picture cut into pieces of `piece` pixels: rows below each other, or columns beside each other."""
    wide = picture.width >= picture.height
    length, thickness = (picture.width, picture.height) if wide else (picture.height, picture.width)
    count = -(-length // piece)
    across = count * (thickness + FOLD_GAP) - FOLD_GAP
    page = Image.new("RGB", (min(piece, length), across) if wide else (across, min(piece, length)), PAPER)
    for number in range(count):
        start, stop = number * piece, min(length, (number + 1) * piece)
        at = number * (thickness + FOLD_GAP)
        box = (start, 0, stop, thickness) if wide else (0, start, thickness, stop)
        page.paste(picture.crop(box), (0, at) if wide else (at, 0))
    return page


def with_grid(picture: Image.Image, box: Rectangle, grid: Grid) -> Image.Image:
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


def framed(pen: ImageDraw.ImageDraw, box: Rectangle, number: int) -> None:
    left, top, right, bottom = box
    width = 3 if min(right - left, bottom - top) > 24 else 1
    pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour_of(number), width=width)


def badge(pen: ImageDraw.ImageDraw, box: Rectangle, number: int) -> None:
    """The tile's number in its upper left corner, as large as the tile has room for; none in a very small one."""
    left, top, right, bottom = box
    room = min(right - left, bottom - top)
    if room < 20:
        return
    text, size, inset = str(number + 1), max(11, min(22, room // 7)), min(8, room // 10)
    width, height = round(font(size).getlength(text)) + size, round(size * 1.5)
    x, y = left + inset, top + inset
    pen.rounded_rectangle((x, y, x + width, y + height), height // 3, colour_of(number), WHITE)
    pen.text((x + width / 2, y + height / 2), text, WHITE, font(size), anchor="mm", stroke_width=0.4)


def line_feed(pen: ImageDraw.ImageDraw, corner: Point, colour: Rgb) -> int:
    """The sign of the return key, which the font lacks. Gives its width."""
    x, y = corner
    pen.line([(x + 18, y + 3), (x + 18, y + 13), (x + 3, y + 13)], colour, 2, joint="curve")
    pen.line([(x + 8, y + 8), (x + 2, y + 13), (x + 8, y + 18)], colour, 2, joint="curve")
    return 20
