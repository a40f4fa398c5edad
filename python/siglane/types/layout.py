"""Where the pixels of an image go: sizes, tiles, and what stands for them in a prompt. Integers only."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]

Detail = Literal["auto", "low", "high", "original"]

Pooling = Literal["bilinear", "average", "max"]
NewlinePlace = Literal["end", "tile", "row", "nowhere"]


class Grid(NamedTuple):
    """A rectangle of patches: `h` rows of `w`."""

    h: int
    w: int

    @property
    def area(self) -> int:
        return self.h * self.w


class Size(NamedTuple):
    """Pixels, width first as Pillow has it."""

    width: int
    height: int


class VideoSize(NamedTuple):
    """A video as a request brings it: the pixels of its first frame and how many frames the model is shown.

    For models that are told the time (`VideoRule.timed`), seconds: when each of them is shown, () where nobody knows;
    duration: of the whole video in seconds, or 0.
    """

    size: Size
    frames: int
    seconds: tuple[float, ...] = ()
    duration: float = 0.0


Medium = Size | VideoSize


class Box(NamedTuple):
    """Pixels, half-open, in Pillow's order."""

    left: int
    top: int
    right: int
    bottom: int


class Region(NamedTuple):
    """A part of an image between pixels, in Pillow's order."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True, slots=True)
class Resize:
    """The picture at `size`. in_float: as a float32 tensor with antialiasing, the way torchvision resizes tensors,
    instead of Pillow's 8-bit filter."""

    size: Size
    resample: Resample
    in_float: bool = False


@dataclass(frozen=True, slots=True)
class Pad:
    """The picture on a canvas of `size`, its upper left corner at `left`, `top`, surrounded by the colour `fill`."""

    size: Size
    left: int
    top: int
    fill: tuple[int, int, int]

    @classmethod
    def square(cls, size: Size, fill: tuple[int, int, int]) -> Pad:
        """A picture of `size` in the middle of the smallest square that holds it."""
        side = max(size)
        return cls(Size(side, side), (side - size.width) // 2, (side - size.height) // 2, fill)


Step = Resize | Pad


@dataclass(frozen=True, slots=True)
class Tile:
    """One crop the tower sees: frame number `frame` (0 of a still picture) drawn by `steps`, cut at `box`, split into
    `grid` patches."""

    steps: tuple[Step, ...]
    box: Box
    grid: Grid
    frame: int = 0

    @property
    def canvas(self) -> Size:
        """Size of what the box is cut from."""
        return self.steps[-1].size

    def in_frames(self, count: int) -> tuple[Tile, ...]:
        """The same of each frame of a video."""
        return tuple(replace(self, frame=frame) for frame in range(count))


@dataclass(frozen=True, slots=True)
class ImagePlaceholder:
    """`rows` consecutive projector rows stand here in the prompt."""

    rows: int


@dataclass(frozen=True, slots=True)
class Indicator:
    """One learned row of the visual vocabulary stands here: number `index` of its last rows (Ovis' start and end)."""

    index: int


@dataclass(frozen=True, slots=True)
class Token:
    """An added token of the tokenizer stands here (nanoVLM's `<row_1_col_1>`). or_text: its letters where the tokenizer
    has none, joined with the text around it."""

    text: str
    or_text: bool = False


@dataclass(frozen=True, slots=True)
class Marker:
    """Text between an image's features. An `isolated` marker is tokenised alone, any other joins its neighbours' text.

    VILA's newline after each block of features is isolated: the reference adds the *embedding* of token 198, so it
    must not fuse with a following newline into one token (formats.md trap 12).
    """

    text: str
    isolated: bool


Piece = ImagePlaceholder | Indicator | Token | Marker


@dataclass(frozen=True, slots=True)
class MergedScales:
    """dynamic_s2: the first tiles show the whole image in squares of `sides` tiles, smallest first, the others form
    `arrangement`; the maps of all scales are joined on the channel axis. No sides: one scale, its channels repeated
    `repeats` times."""

    sides: tuple[int, ...]
    repeats: int


@dataclass(frozen=True, slots=True)
class AnyRes:
    """LLaVA-OneVision: after the first tile (the whole image) the others form one map of projector rows. `crop` cuts
    the padding off, `resized` brings a map that is too large to fewer rows, and every row of the map ends with the
    learned newline."""

    crop: Box
    resized: Grid | None


@dataclass(frozen=True, slots=True)
class Newline:
    """LLaVA-OneVision: the rows of all tiles, each tile's map first brought to `pooled` when that is given, then the
    learned newline once. pooling: how, of 2x2 neighbours where it is not bilinear; place: where the newline stands,
    behind everything, every tile, every row of a tile's map, or nowhere (LLaVA-Video)."""

    pooled: Grid | None
    pooling: Pooling = "bilinear"
    place: NewlinePlace = "end"

    def count(self, tiles: int, projected: Grid) -> int:
        """How many newlines there are. projected: of each of `tiles`, before pooling."""
        return {"end": 1, "tile": tiles, "row": tiles * (self.pooled or projected).h, "nowhere": 0}[self.place]


@dataclass(frozen=True, slots=True)
class MergedFirst:
    """VideoLLaMA3: each tile's map of features is brought to its `projected` rows and columns before it is projected.

    drops_still: rows of a frame that show what the frame before shows are left out of the prompt, which only pixels
    tell (`image.still.settled`); kept: then a byte for each row, 0 for those, None while nobody knows.
    """

    drops_still: bool = False
    kept: bytes | None = None


Assembly = MergedScales | AnyRes | Newline | MergedFirst


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """How one image or video becomes tiles, patches and prompt rows; computed from its size alone (`tiling`).

    source: size of the upright image or of the first frame; tiles in the order the tower sees them; pieces in prompt
    order; arrangement: rows and columns of the tile map; assembly: how projector rows of the tiles become the
    image's, None when they simply follow each other; frames: how many of a video, 0 for a still picture; projected:
    rows and columns that the projector makes of each tile it sees (`projector_grids`).
    """

    source: Size
    tiles: tuple[Tile, ...]
    pieces: tuple[Piece, ...]
    arrangement: Grid
    assembly: Assembly | None = None
    frames: int = 0
    projected: tuple[Grid, ...] = field(kw_only=True)

    @property
    def placeholders(self) -> tuple[int, ...]:
        """Rows of each run of them in the prompt."""
        return tuple(piece.rows for piece in self.pieces if isinstance(piece, ImagePlaceholder))

    @property
    def image_tokens(self) -> int:
        """Rows the projector gives for this image."""
        return sum(self.placeholders)

    @property
    def rows(self) -> int:
        """Prompt positions that are filled from the image: its features and indicators."""
        return self.image_tokens + sum(isinstance(piece, Indicator) for piece in self.pieces)

    @property
    def grids(self) -> tuple[Grid, ...]:
        return tuple(tile.grid for tile in self.tiles)

    @property
    def projector_grids(self) -> tuple[Grid, ...]:
        """Rows and columns of what the projector sees, patches or what they are merged to first; with merged scales the
        tiles of the last one."""
        if isinstance(self.assembly, MergedFirst):
            return self.projected
        if isinstance(self.assembly, MergedScales) and self.assembly.sides:
            return self.grids[-self.arrangement.area :]
        return self.grids

    @property
    def patches(self) -> int:
        return sum(tile.grid.area for tile in self.tiles)
