"""VILA's tilings: one squashed or padded tile, a dynamic grid with a thumbnail, or three scales (formats.md 5.4).

Source: NVlabs/VILA `llava/mm_utils.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from siglane.errors import ConfigError, UserError
from siglane.tiling.rule import (
    MOST_TILES,
    Budgeted,
    ImageBudget,
    ImageContext,
    LayoutRule,
    PatchGeometry,
    split,
    whole_tile,
)
from siglane.types import (
    Grid,
    ImageLayout,
    ImagePlaceholder,
    Marker,
    MergedScales,
    Pad,
    Piece,
    Resample,
    Size,
    Tile,
    VideoSize,
)

Tiling = Literal["squash", "pad", "dynamic", "dynamic_s2"]

LINE_FEED = Marker("\n", isolated=True)
NEWLINE = Marker("\n", isolated=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class VilaTiling(LayoutRule):
    """tile: pixels of one tile; resample: of a tile that holds the whole picture; min_tiles, max_tiles: bounds of the
    dynamic grid; s2_scales: tile-map sides in pixels, ascending (dynamic_s2); fill: the colour "pad" surrounds the
    picture with."""

    tile: Size
    resample: Resample
    tiling: Tiling
    min_tiles: int
    max_tiles: int
    s2_scales: tuple[int, ...]
    fill: tuple[int, int, int]

    def __post_init__(self) -> None:
        if self.tiling == "dynamic" and not 1 <= self.min_tiles <= self.max_tiles:
            raise ConfigError(f"min_tiles {self.min_tiles} and max_tiles {self.max_tiles} leave no grid of tiles")
        if self.tiling == "dynamic_s2":
            self._check_s2_scales()

    def _check_s2_scales(self) -> None:
        scales = self.s2_scales
        ascending = scales == tuple(sorted(set(scales)))
        if not scales or not ascending or scales[0] < 1 or any(scale % scales[0] for scale in scales):
            raise ConfigError(f"s2_scales {scales} must be ascending multiples of the first")
        if (scales[-1] // scales[0]) ** 2 > self.max_tiles:
            raise ConfigError(f"max_tiles {self.max_tiles} is too small for the largest square of s2_scales {scales}")

    def image(self, size: Size, geometry: PatchGeometry, context: ImageContext) -> ImageLayout:
        """Only the single image of a request is tiled dynamically; any other becomes one tile."""
        if context.alone and self.tiling == "dynamic":
            return self._dynamic(size, geometry)
        if context.alone and self.tiling == "dynamic_s2":
            return self._scales(size, geometry)
        whole = self._whole(size, geometry)
        rows = geometry.projected(whole.grid)
        pieces = (ImagePlaceholder(rows.area), LINE_FEED)
        return ImageLayout(size, (whole,), pieces, Grid(1, 1), self._repeated(), projected=(rows,))

    def video(self, video: VideoSize, geometry: PatchGeometry) -> ImageLayout:
        """Every frame is one tile with a line feed behind it."""
        tiles = self._whole(video.size, geometry).in_frames(video.frames)
        rows = geometry.projected(tiles[0].grid)
        pieces = (ImagePlaceholder(rows.area), LINE_FEED) * video.frames
        projected = (rows,) * video.frames
        return ImageLayout(video.size, tiles, pieces, Grid(1, 1), self._repeated(), video.frames, projected=projected)

    def within(self, budget: ImageBudget) -> Budgeted:
        """`max_tiles` bounds the dynamic grid; `low` is one tile, the other details are the checkpoint's tiling."""
        if self.tiling not in ("dynamic", "dynamic_s2"):
            budget.refuse_others()
            return Budgeted(self, "auto")
        budget.refuse_others("max_tiles")
        if budget.detail == "low":
            return Budgeted(replace(self, tiling="squash"), "low")
        most = self.max_tiles if budget.max_tiles is None else budget.max_tiles
        least = tile_bounds(self)[0]
        if not least <= most <= MOST_TILES:
            message = f"max_tiles {most} is not between {least} and {MOST_TILES}; give another, or detail 'low'"
            raise UserError(message, code="invalid_budget", param="max_tiles")
        return Budgeted(replace(self, max_tiles=most), "auto" if budget.detail == "auto" else "high")

    def _dynamic(self, size: Size, geometry: PatchGeometry) -> ImageLayout:
        arrangement = self._arrangement(size)
        # VILA resizes a tiled picture with Pillow's default, whatever its processor is told
        resample: Resample = "bicubic" if arrangement != (1, 1) else self.resample
        tiles = split(arrangement, self.tile, geometry, resample)
        if len(tiles) > 1:
            tiles += (whole_tile(self.tile, resample, geometry),)  # the thumbnail comes last
        rows = geometry.projected(tiles[0].grid)
        pieces: tuple[Piece, ...] = (ImagePlaceholder(rows.area), LINE_FEED, NEWLINE) * len(tiles)
        return ImageLayout(size, tiles, pieces, arrangement, projected=(rows,) * len(tiles))

    def _scales(self, size: Size, geometry: PatchGeometry) -> ImageLayout:
        arrangement = self._arrangement(size)
        sides = tuple(scale // self.s2_scales[0] for scale in self.s2_scales[:-1])
        # every scale but the last is a fixed square of tiles
        grids = (*(Grid(side, side) for side in sides), arrangement)
        tiles = tuple(tile for grid in grids for tile in split(grid, self.tile, geometry, "bicubic"))
        rows = geometry.projected(tiles[0].grid)
        pieces = (ImagePlaceholder(arrangement.area * rows.area), LINE_FEED)
        scales = MergedScales(sides, len(self.s2_scales))
        return ImageLayout(size, tiles, pieces, arrangement, scales, projected=(rows,) * arrangement.area)

    def _arrangement(self, size: Size) -> Grid:
        columns, rows = closest_tile_grid(size, self)
        return Grid(rows, columns)

    def _whole(self, size: Size, geometry: PatchGeometry) -> Tile:
        padding = (Pad.square(size, self.fill),) if self.tiling == "pad" and size.width != size.height else ()
        return whole_tile(self.tile, self.resample, geometry, padding)

    def _repeated(self) -> MergedScales | None:
        """A single tile of a model that joins scales on the channel axis shows the same scale in all of them."""
        return MergedScales((), len(self.s2_scales)) if self.s2_scales else None


def closest_tile_grid(size: Size, rule: VilaTiling) -> Size:
    """Columns and rows of tiles whose aspect ratio is closest to the image's.

    Candidates are ordered by their product (then by columns, then rows); on an exact tie the later one wins when the
    image has more than half of its pixels.
    """
    ratio = size.width / size.height
    best, best_distance = Size(1, 1), float("inf")
    for candidate in _candidates(*tile_bounds(rule)):
        distance = abs(ratio - candidate.width / candidate.height)
        half = 0.5 * rule.tile.width * rule.tile.height * candidate.width * candidate.height
        if distance < best_distance or (distance == best_distance and size.width * size.height > half):
            best, best_distance = candidate, distance
    return best


def tile_bounds(rule: VilaTiling) -> tuple[int, int]:
    """Fewest and most tiles of the dynamic grid; dynamic_s2 needs at least its largest square scale."""
    if rule.tiling == "dynamic_s2":
        return (rule.s2_scales[-1] // rule.s2_scales[0]) ** 2, rule.max_tiles
    return rule.min_tiles, rule.max_tiles


def _candidates(min_tiles: int, max_tiles: int) -> list[Size]:
    found = [
        Size(columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    ]
    return sorted(found, key=lambda candidate: (candidate.width * candidate.height, candidate))
