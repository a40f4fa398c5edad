"""The one token count: image size -> tiles, patch grids and prompt rows. Pure integers, no pixels, no weights.

Prompt expansion, admission, the scheduler, `siglane tokens` and the projector's check all come here, so that the
number of placeholders and the number of projector rows cannot differ. Rules and vectors: formats.md 5.4 (VILA's
`llava/mm_utils.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

from siglane.config.preprocess import PreprocessConfig
from siglane.config.projector import ProjectorConfig
from siglane.types import Box, Features, Grid, ImageLayout, Marker, Piece, Size, Tile

LINE_FEED = Marker("\n", isolated=True)
NEWLINE = Marker("\n", isolated=False)


def image_layout(
    size: Size, preprocess: PreprocessConfig, projector: ProjectorConfig, patch_size: int, *, alone: bool
) -> ImageLayout:
    """Layout of one image of `size` pixels.

    alone: it is the only image of its request; VILA's dynamic tilings apply to such images only, any other image
    becomes one tile.
    """
    tile = preprocess.tile
    grid = Grid(tile.height // patch_size, tile.width // patch_size)
    rows = projected_grid(grid, projector).area
    if preprocess.tiling == "dynamic_s2" and alone:
        columns_rows = closest_tile_grid(size, preprocess)
        arrangement = Grid(columns_rows.height, columns_rows.width)
        pieces: tuple[Piece, ...] = (Features(arrangement.area * rows), LINE_FEED)
        return ImageLayout(size, tuple(_s2_tiles(preprocess, columns_rows, grid)), pieces, arrangement)
    if preprocess.tiling == "dynamic" and alone:
        columns_rows = closest_tile_grid(size, preprocess)
        tiles = tuple(_split(columns_rows, tile, grid))
        if len(tiles) > 1:
            tiles += _split(Size(1, 1), tile, grid)  # the thumbnail comes last
        pieces = (Features(rows), LINE_FEED, NEWLINE) * len(tiles)
        return ImageLayout(size, tiles, pieces, Grid(columns_rows.height, columns_rows.width))
    return ImageLayout(size, _split(Size(1, 1), tile, grid), (Features(rows), LINE_FEED), Grid(1, 1))


def projected_grid(grid: Grid, projector: ProjectorConfig) -> Grid:
    """Rows and columns the projector makes of one tile's patch grid."""
    match projector.merge:
        case "none":
            return grid
        case "average":
            if projector.target is None:
                raise ValueError("an averaging projector needs a target grid")
            return projector.target
        case "pixel_shuffle":
            if grid.h % projector.factor or grid.w % projector.factor:
                raise ValueError(f"pixel shuffle by {projector.factor} does not divide a grid of {grid.h}x{grid.w}")
            return Grid(grid.h // projector.factor, grid.w // projector.factor)
        case "blocks":
            return Grid(-(-grid.h // projector.factor), -(-grid.w // projector.factor))


def closest_tile_grid(size: Size, preprocess: PreprocessConfig) -> Size:
    """Columns and rows of tiles whose aspect ratio is closest to the image's.

    Candidates are ordered by their product (then by columns, then rows); on an exact tie the later one wins when the
    image has more than half of its pixels.
    """
    min_tiles, max_tiles = tile_bounds(preprocess)
    ratio = size.width / size.height
    best, best_distance = Size(1, 1), float("inf")
    for candidate in _candidates(min_tiles, max_tiles):
        distance = abs(ratio - candidate.width / candidate.height)
        half = 0.5 * preprocess.tile.width * preprocess.tile.height * candidate.width * candidate.height
        if distance < best_distance or (distance == best_distance and size.width * size.height > half):
            best, best_distance = candidate, distance
    return best


def tile_bounds(preprocess: PreprocessConfig) -> tuple[int, int]:
    """Fewest and most tiles of the dynamic grid; dynamic_s2 needs at least its largest square scale."""
    if preprocess.tiling == "dynamic_s2":
        return (preprocess.s2_scales[-1] // preprocess.s2_scales[0]) ** 2, preprocess.max_tiles
    return preprocess.min_tiles, preprocess.max_tiles


def _candidates(min_tiles: int, max_tiles: int) -> list[Size]:
    found = [
        Size(columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    ]
    return sorted(found, key=lambda candidate: (candidate.width * candidate.height, candidate))


def _split(columns_rows: Size, tile: Size, grid: Grid) -> tuple[Tile, ...]:
    """The image resized to columns x rows tiles, cut row by row."""
    columns, rows = columns_rows
    canvas = Size(columns * tile.width, rows * tile.height)
    return tuple(
        Tile(canvas, Box(x, y, x + tile.width, y + tile.height), grid)
        for y in range(0, canvas.height, tile.height)
        for x in range(0, canvas.width, tile.width)
    )


def _s2_tiles(preprocess: PreprocessConfig, last: Size, grid: Grid) -> Iterator[Tile]:
    """Every scale but the last as a fixed square of tiles, then the dynamic grid."""
    for scale in preprocess.s2_scales[:-1]:
        side = scale // preprocess.s2_scales[0]
        yield from _split(Size(side, side), preprocess.tile, grid)
    yield from _split(last, preprocess.tile, grid)
