"""A small world to look at: one to four coloured shapes and perhaps a sign with a printed word or number.

`random_scene` invents a scene, `draw` paints it, `patch_labels` says what each patch of the picture shows. All three
are deterministic functions of their arguments; the font is the one that ships inside Pillow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from siglane.types import Grid, Size

Rgb = tuple[int, int, int]

KINDS = ("circle", "square", "triangle", "star")
COLOURS: dict[str, Rgb] = {
    "red": (222, 40, 40),
    "orange": (246, 140, 30),
    "yellow": (250, 214, 40),
    "green": (42, 160, 70),
    "blue": (38, 92, 214),
    "purple": (134, 58, 176),
    "pink": (246, 140, 190),
    "black": (34, 34, 38),
}
SIZES = ("small", "big")
CANVASES = (Size(384, 384), Size(448, 384), Size(384, 448))

_WORDS = """
STOP OPEN CAFE BANK TAXI HOTEL PARK EXIT SHOP FOOD BOOK FIRE SALE FREE MILK BREAD WATER COFFEE PIZZA MUSIC
SCHOOL BRIDGE GARDEN MUSEUM OFFICE LIBRARY THEATRE STATION POLICE DOCTOR NORTH SOUTH EAST WEST LEFT RIGHT PUSH PULL
SLOW FAST QUIET HELLO WELCOME THANKS PLEASE SORRY PEACE LOVE HOPE LUCK HOME ROAD LANE HILL LAKE RIVER BEACH
ISLAND FOREST WINTER SUMMER SPRING AUTUMN MONDAY FRIDAY SUNDAY TODAY NIGHT MORNING LUNCH DINNER APPLE LEMON CHERRY
GRAPE PEACH ONION CARROT HONEY SUGAR TEA JAM EGG FISH BIRD HORSE TIGER LION ZEBRA MOUSE SHEEP DUCK FROG WOLF
BEAR FOX OWL BEE CAT DOG COW PIG BUS TRAIN BOAT PLANE BIKE CAR SHIP METRO TICKET MARKET BAKERY JUICE SOUP CAKE
GIFT TOY GAME FILM RADIO PHONE PAPER PENCIL
"""
WORDS = tuple(word for word in _WORDS.split() if len(word) <= 6)  # what a plate has room for
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"

RADIUS = {"small": 0.085, "big": 0.15}  # of the shorter side; the gap keeps "big or small" unambiguous
MIN_STEP = 0.08  # between the centres of two shapes along x, of the width: keeps "left of" unambiguous
CELL = 0.113  # width of one character, of the shorter side: wider than a patch, so that none hides between two
PLATE_HEIGHT = 0.17
MARGIN = 0.025
SIGN_SHARE = 0.7  # of all scenes have a sign
NUMBER_SHARE = 0.25  # of all signs show a number


@dataclass(frozen=True, slots=True)
class Shape:
    """kind, colour and size by name; centre and radius in pixels of the canvas; rgb: the colour, a little off."""

    kind: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    rgb: Rgb


@dataclass(frozen=True, slots=True)
class Sign:
    """A plate centred at (x, y) whose characters stand in cells of equal width."""

    text: str
    x: float
    y: float
    cell: float
    height: float

    @property
    def width(self) -> float:
        return (len(self.text) + 0.5) * self.cell

    def cell_left(self, index: int) -> float:
        return self.x + (index - len(self.text) / 2) * self.cell


@dataclass(frozen=True, slots=True)
class Scene:
    """shapes: from left to right, no two alike in both kind and colour, none overlapping another or the sign; page:
    further signs, of pictures that are only looked at (`random_page`)."""

    canvas: Size
    background: Rgb
    shapes: tuple[Shape, ...]
    sign: Sign | None
    page: tuple[Sign, ...] = ()

    @property
    def signs(self) -> tuple[Sign, ...]:
        return self.page if self.sign is None else (self.sign, *self.page)


def random_scene(
    rng: np.random.Generator,
    printed: str | None = None,
    canvas: Size | None = None,
    print_scale: float = 1.0,
    shapes_wanted: int | None = None,
    sign_share: float = SIGN_SHARE,
) -> Scene:
    """A scene in which every question of `questions.py` has exactly one right answer.

    printed: what its sign says; by default chance decides whether there is one and what it says. canvas: by default
    one of CANVASES. print_scale: size of the sign and its print, 1 at most. shapes_wanted: 1 to 4, by default any of
    them; sign_share: how often there is a sign.
    """
    canvas = canvas or CANVASES[rng.integers(len(CANVASES))]
    background = _jitter((238, 238, 236), 14, rng)
    count = shapes_wanted or int(rng.integers(1, 5))
    while True:  # a crowded canvas may leave no room for the last shape: begin again
        text = printed or _random_text(rng, sign_share)
        sign = _random_sign(canvas, text, print_scale, rng) if text else None
        shapes: list[Shape] = []
        for _ in range(count):
            shape = _place_shape(canvas, shapes, sign, rng)
            if shape is None:
                break
            shapes.append(shape)
        if len(shapes) == count:
            return Scene(canvas, background, tuple(sorted(shapes, key=lambda shape: shape.x)), sign)


def random_page(rng: np.random.Generator, canvas: Size, print_scale: float) -> Scene:
    """A canvas full of signs with random letters: reading practice, hundreds of characters in one picture."""
    side = min(canvas)
    cell, height, margin = CELL * side * print_scale, PLATE_HEIGHT * side * print_scale, MARGIN * side * print_scale
    signs = []
    y = margin + rng.uniform(0, height)
    while y + height + margin < canvas.height:
        x = margin + rng.uniform(0, 2 * cell)
        while True:
            length = int(rng.integers(1, 7))
            text = "".join(CHARACTERS[number] for number in rng.integers(len(CHARACTERS), size=length))
            sign = Sign(text, 0.0, 0.0, cell, height)
            if x + sign.width + margin > canvas.width:
                break
            signs.append(Sign(text, x + sign.width / 2, y + height / 2, cell, height))
            x += sign.width + margin + rng.uniform(0, cell)
        y += height + margin + rng.uniform(0, 0.5 * height)
    return Scene(canvas, _jitter((238, 238, 236), 14, rng), (), None, tuple(signs))


def _random_text(rng: np.random.Generator, sign_share: float) -> str | None:
    if rng.random() >= sign_share:
        return None
    if rng.random() < NUMBER_SHARE:
        return str(rng.integers(10 ** int(rng.integers(1, 4))))
    return WORDS[rng.integers(len(WORDS))]


def _random_sign(canvas: Size, text: str, print_scale: float, rng: np.random.Generator) -> Sign:
    side = min(canvas)
    sign = Sign(text, 0.0, 0.0, CELL * side * print_scale, PLATE_HEIGHT * side * print_scale)
    across, down = sign.width / 2 + MARGIN * side, sign.height / 2 + MARGIN * side
    x, y = rng.uniform(across, canvas.width - across), rng.uniform(down, canvas.height - down)
    return Sign(text, x, y, sign.cell, sign.height)


def _place_shape(canvas: Size, others: list[Shape], sign: Sign | None, rng: np.random.Generator) -> Shape | None:
    side = min(canvas)
    taken = {(other.kind, other.colour) for other in others}
    for _ in range(40):
        kind, colour = KINDS[rng.integers(len(KINDS))], list(COLOURS)[rng.integers(len(COLOURS))]
        size = SIZES[rng.integers(len(SIZES))]
        radius = RADIUS[size] * side * rng.uniform(0.92, 1.08)
        edge = radius + MARGIN * side
        x, y = rng.uniform(edge, canvas.width - edge), rng.uniform(edge, canvas.height - edge)
        free = (kind, colour) not in taken and not (sign and _touches_sign(x, y, edge, sign))
        free = free and all(
            abs(x - other.x) >= MIN_STEP * canvas.width and math.hypot(x - other.x, y - other.y) >= edge + other.radius
            for other in others
        )
        if free:
            return Shape(kind, colour, size, x, y, radius, _jitter(COLOURS[colour], 10, rng))
    return None


def _touches_sign(x: float, y: float, radius: float, sign: Sign) -> bool:
    across = max(abs(x - sign.x) - sign.width / 2, 0.0)
    down = max(abs(y - sign.y) - sign.height / 2, 0.0)
    return math.hypot(across, down) < radius


def _jitter(rgb: Rgb, amount: int, rng: np.random.Generator) -> Rgb:
    red, green, blue = (int(np.clip(value + rng.integers(-amount, amount + 1), 0, 255)) for value in rgb)
    return red, green, blue


def draw(scene: Scene, scale: int = 1) -> Image.Image:
    """The picture, RGB, `scene.canvas` pixels. scale: paint that many times larger and shrink, for smooth edges."""
    picture = Image.new("RGB", (scene.canvas.width * scale, scene.canvas.height * scale), scene.background)
    pen = ImageDraw.Draw(picture)
    for shape in scene.shapes:
        _draw_shape(pen, shape, scale)
    for sign in scene.signs:
        _draw_sign(pen, sign, scale)
    return picture if scale == 1 else picture.resize(scene.canvas, Image.Resampling.BOX)


def _draw_shape(pen: ImageDraw.ImageDraw, shape: Shape, scale: int) -> None:
    x, y, radius = shape.x * scale, shape.y * scale, shape.radius * scale
    red, green, blue = (value * 7 // 10 for value in shape.rgb)
    rim, width = (red, green, blue), 3 * scale
    match shape.kind:
        case "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), shape.rgb, rim, width)
        case "square":
            half = radius * 0.86
            pen.rectangle((x - half, y - half, x + half, y + half), shape.rgb, rim, width)
        case "triangle":
            foot = y + radius * 0.8
            _draw_polygon(pen, [(x, y - radius), (x + radius, foot), (x - radius, foot)], shape.rgb, rim, width)
        case _:
            points = []
            for corner in range(10):
                reach = radius * (1.08 if corner % 2 == 0 else 0.46)
                angle = math.pi * corner / 5
                points.append((x + reach * math.sin(angle), y - reach * math.cos(angle)))
            _draw_polygon(pen, points, shape.rgb, rim, width)


def _draw_polygon(pen: ImageDraw.ImageDraw, points: list[tuple[float, float]], fill: Rgb, rim: Rgb, width: int) -> None:
    pen.polygon(points, fill)
    pen.line([*points, points[0], points[1]], rim, width, joint="curve")


def _draw_sign(pen: ImageDraw.ImageDraw, sign: Sign, scale: int) -> None:
    across, down = sign.width / 2, sign.height / 2
    plate = [(sign.x - across) * scale, (sign.y - down) * scale, (sign.x + across) * scale, (sign.y + down) * scale]
    pen.rounded_rectangle(plate, 8 * scale, (255, 255, 255), (40, 60, 90), 4 * scale)
    font = _font(round(1.02 * sign.cell * scale))
    for index, character in enumerate(sign.text):
        middle = (sign.cell_left(index) + sign.cell / 2) * scale
        baseline = (sign.y + 0.36 * sign.cell) * scale  # capitals are 0.72 of the font size high
        pen.text((middle, baseline), character, (20, 24, 30), font, "ms", stroke_width=scale, stroke_fill=(20, 24, 30))


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType; the demo's signs need it")
    return font


# what one patch shows, one column of `patch_labels` each -> number of classes (class 0: none)
LABELS = {
    "kind": len(KINDS) + 1,
    "colour": len(COLOURS) + 1,
    "size": len(SIZES) + 1,
    "rank": 5,  # of the shape from left to right
    "character": len(CHARACTERS) + 1,
    "index": 7,  # of the character in its word
}


def patch_labels(scene: Scene, grid: Grid) -> npt.NDArray[np.int64]:
    """What the centre of each patch shows, canvas squashed onto `grid`: i64 `[h * w, len(LABELS)]`, raster order."""
    xs = (np.arange(grid.w) + 0.5) * scene.canvas.width / grid.w
    ys = (np.arange(grid.h) + 0.5) * scene.canvas.height / grid.h
    x, y = np.meshgrid(xs, ys)
    labels = np.zeros((grid.h, grid.w, len(LABELS)), dtype=np.int64)
    for rank, shape in enumerate(scene.shapes):
        inside = np.hypot(x - shape.x, y - shape.y) <= shape.radius
        facts = (KINDS.index(shape.kind), list(COLOURS).index(shape.colour), SIZES.index(shape.size), rank)
        labels[inside, :4] = [fact + 1 for fact in facts]
    for sign in scene.signs:
        row = np.abs(y - sign.y) <= sign.height / 2
        for index, character in enumerate(sign.text):
            left = sign.cell_left(index)
            inside = row & (x >= left) & (x < left + sign.cell)
            labels[inside, 4:] = [CHARACTERS.index(character) + 1, index + 1]
    return labels.reshape(grid.area, len(LABELS))
