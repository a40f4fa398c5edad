"""LLaVA's anyres: the whole picture in one tile, then again in tiles of a fitting canvas (formats.md 6, 6.2).

Sources: transformers `image_processing_pil_llava_onevision.py`, `image_processing_utils.py` (`select_best_resolution`,
`get_patch_output_size`) and `LlavaOnevisionModel.pack_image_features`. The quotients are floats there and here: their
rounding decides how many rows an image has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from siglane.errors import ConfigError, UserError
from siglane.tiling.rule import MOST_TILES, Budgeted, ImageBudget, ImageContext, LayoutRule, PatchGeometry, whole_tile
from siglane.types import (
    AnyRes,
    Box,
    Grid,
    ImageLayout,
    ImagePlaceholder,
    Marker,
    Newline,
    NewlinePlace,
    Pad,
    Piece,
    Pooling,
    Resample,
    Resize,
    Size,
    Step,
    Tile,
    VideoSize,
)

Pinpoint = tuple[int, int]
BLACK = (0, 0, 0)
SHRUNK_FROM = 1.1  # a map is left as it is until its sides are this much longer than those of `max_maps` tiles


@dataclass(frozen=True, slots=True, kw_only=True)
class AnyResTiling(LayoutRule):
    """tile: pixels of one square tile; resample: of pictures, frame_resample: of a video's frames; fill: the colour
    around a picture that shares its request with others; pinpoints: canvases (height, width) in pixels to choose from,
    the first one of equals wins; max_maps: the tiles together keep about as many rows as so many tiles have (the number
    in `anyres_max_9`), None: all they have; base_only: a picture is one tile even when it is alone (detail "low");
    always_padded: so it is, and padded as others are; digits: to which the length of a picture on its map is rounded
    before it is cut to an integer, None: not at all; pooling, newlines: of a video's frames; timed: a sentence behind
    them says when each is shown (LLaVA-Video), where that is known."""

    tile: Size
    resample: Resample
    frame_resample: Resample
    fill: tuple[int, int, int]
    pinpoints: tuple[Pinpoint, ...]
    max_maps: int | None
    base_only: bool = False
    always_padded: bool = False
    digits: int | None = 7
    pooling: Pooling = "bilinear"
    newlines: NewlinePlace = "end"
    timed: bool = False

    def __post_init__(self) -> None:
        if self.tile.width != self.tile.height:
            raise ConfigError(f"anyres needs square tiles, got {self.tile.width}x{self.tile.height}")
        if problem := self._problem(self.pinpoints, MOST_TILES):
            raise ConfigError(f"image_grid_pinpoints: {problem}")

    def image(self, size: Size, geometry: PatchGeometry, context: ImageContext) -> ImageLayout:
        """The single picture of a request is tiled, any other is padded to a square and becomes one tile."""
        alone = context.alone and not self.always_padded
        if alone and not self.base_only:
            return self._tiled(size, geometry)
        padding = () if alone or size.width == size.height else (Pad.square(size, self.fill),)
        whole = whole_tile(self.tile, self.resample, geometry, padding)
        rows = geometry.projected(whole.grid)
        pieces = (ImagePlaceholder(rows.area + 1),)
        return ImageLayout(size, (whole,), pieces, Grid(1, 1), Newline(None), projected=(rows,))

    def video(self, video: VideoSize, geometry: PatchGeometry) -> ImageLayout:
        """Every frame is squashed to one tile and keeps a quarter of its rows; newlines end them as `newlines` says."""
        whole = whole_tile(self.tile, self.frame_resample, geometry)
        rows, tiles = geometry.projected(whole.grid), whole.in_frames(video.frames)
        up = int(self.pooling == "bilinear")  # the others leave out what is over
        pooled = Grid((rows.h + up) // 2, (rows.w + up) // 2)
        assembly, projected = Newline(pooled, self.pooling, self.newlines), (rows,) * video.frames
        pieces: tuple[Piece, ...] = (ImagePlaceholder(video.frames * pooled.area + assembly.count(video.frames, rows)),)
        if self.timed and video.seconds:
            pieces += (Marker(in_time(video), isolated=False),)
        return ImageLayout(video.size, tiles, pieces, Grid(1, 1), assembly, video.frames, projected=projected)

    def within(self, budget: ImageBudget) -> Budgeted:
        """`grid_pinpoints` replaces the canvases, `max_tiles` leaves out the larger ones but for the smallest; `low` is
        the whole picture in one tile, every other detail the checkpoint's choice. Nothing of it means anything where
        pictures are always padded."""
        if self.always_padded:
            budget.refuse_others()
            return Budgeted(self, "auto")
        budget.refuse_others("max_tiles", "grid_pinpoints")
        if budget.detail == "low":
            return Budgeted(replace(self, base_only=True), "low")
        pinpoints = self.pinpoints
        if budget.grid_pinpoints is not None:
            pinpoints = budget.grid_pinpoints
            if problem := self._problem(pinpoints, max(map(self._tiles, self.pinpoints))):
                raise UserError(f"grid_pinpoints: {problem}", code="invalid_budget", param="grid_pinpoints")
        if budget.max_tiles is not None:
            fitting = tuple(pinpoint for pinpoint in pinpoints if self._tiles(pinpoint) <= budget.max_tiles)
            pinpoints = fitting or (min(pinpoints, key=self._tiles),)
        return Budgeted(replace(self, pinpoints=pinpoints), "auto" if budget.detail == "auto" else "high")

    def _tiled(self, size: Size, geometry: PatchGeometry) -> ImageLayout:
        height, width = best_pinpoint(size, self.pinpoints)
        side, base = self.tile.width, whole_tile(self.tile, self.resample, geometry)
        steps = fitted(size, Size(width, height), self.resample)
        boxes = (Box(x, y, x + side, y + side) for y in range(0, height, side) for x in range(0, width, side))
        tiles = (base, *(Tile(steps, box, base.grid) for box in boxes))
        arrangement, rows = Grid(height // side, width // side), geometry.projected(base.grid)
        crop = unpadded(size, Grid(arrangement.h * rows.h, arrangement.w * rows.w), self.digits)
        whole_map = Grid(crop.bottom - crop.top, crop.right - crop.left)
        resized = None if self.max_maps is None else shrunk(whole_map, self.max_maps * rows.area)
        kept = resized or whole_map
        pieces = (ImagePlaceholder(rows.area + kept.h * (kept.w + 1)),)
        projected = (rows,) * len(tiles)
        return ImageLayout(size, tiles, pieces, arrangement, AnyRes(crop, resized), projected=projected)

    def _tiles(self, pinpoint: Pinpoint) -> int:
        return pinpoint[0] * pinpoint[1] // (self.tile.width * self.tile.height)

    def _problem(self, pinpoints: Sequence[Pinpoint], most: int) -> str | None:
        """What is wrong with `pinpoints`, None when nothing is."""
        side = self.tile.width
        if not pinpoints:
            return "give at least one (height, width)"
        for height, width in pinpoints:
            if min(height, width) < side or height % side or width % side:
                return f"{height}x{width} is not a multiple of the tile's {side} pixels"
            if self._tiles((height, width)) > most:
                return f"{height}x{width} are {self._tiles((height, width))} tiles, at most {most} are possible"
        return None


def in_time(video: VideoSize) -> str:
    """What LLaVA-Video was told in training, between the placeholder's line feed and the question's."""
    places = ",".join(f"{second:.2f}s" for second in video.seconds)
    return (
        f"\nThe video lasts for {video.duration:.2f} seconds, and {video.frames} frames are uniformly sampled from it. "
        f"These frames are located at {places}.Please answer the following questions related to this video."
    )


def best_pinpoint(size: Size, pinpoints: Sequence[Pinpoint]) -> Pinpoint:
    """The canvas that keeps most of the picture's pixels; of those the one that wastes least; of those the first."""

    def worth(pinpoint: Pinpoint) -> tuple[int, int]:
        height, width = pinpoint
        scale = min(width / size.width, height / size.height)
        kept = min(int(size.width * scale) * int(size.height * scale), size.width * size.height)
        return kept, kept - height * width

    return max(pinpoints, key=worth)


def fitted(size: Size, canvas: Size, resample: Resample) -> tuple[Step, ...]:
    """The picture as large as `canvas` allows at its aspect ratio, in the middle of black."""
    across, down = canvas.width / size.width, canvas.height / size.height
    if across < down:
        inside = Size(canvas.width, min(math.ceil(size.height * across), canvas.height))
    else:
        inside = Size(min(math.ceil(size.width * down), canvas.width), canvas.height)
    left, top = (canvas.width - inside.width) // 2, (canvas.height - inside.height) // 2
    return Resize(inside, resample), Pad(canvas, left, top, BLACK)


def unpadded(size: Size, rows: Grid, digits: int | None = 7) -> Box:
    """The part of a map of `rows` that shows the picture; a very flat one may have none. digits: as of the rule."""
    wide = size.width / size.height > rows.w / rows.h
    length = size.height * (rows.w / size.width) if wide else size.width * (rows.h / size.height)
    shown = int(length if digits is None else round(length, digits))
    if wide:
        padding = (rows.h - shown) // 2
        return Box(0, padding, rows.w, rows.h - padding)
    padding = (rows.w - shown) // 2
    return Box(padding, 0, rows.w - padding, rows.h)


def shrunk(rows: Grid, most: int) -> Grid | None:
    """The smaller map that one of more than about `most` rows is brought to, None where it stays as it is.

    At least one row and column remain; the reference fails where they do not.
    """
    ratio = math.sqrt(rows.area / most)
    if ratio <= SHRUNK_FROM:
        return None
    return Grid(max(1, int(rows.h // ratio)), max(1, int(rows.w // ratio)))
