"""nanoVLM's tiles: the picture brought to whole squares and cut row by row, all of it first (formats.md 7.2, 7.3).

Source: huggingface/nanoVLM `data/custom_transforms.py` (DynamicResize, SplitImage, GlobalAndSplitImages) and
`data/processors.py` (`get_image_string`). The quotients are floats there and here: their rounding decides how many
tiles an image has. The pictures of its first two releases are `Squash`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from siglane.errors import ConfigError
from siglane.tiling.rule import ImageContext, PatchGeometry, TiledRule, split
from siglane.types import Box, Grid, ImageLayout, ImagePlaceholder, Marker, Piece, Resize, Size, Tile, Token


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeTiles(TiledRule):
    """side: pixels of a square tile; longest: tiles along the longer side of a picture, at most, fewer where a picture
    has more than `most`; enlarge: every picture has so many (`resize_to_max_side_len`).

    global_token: stands in front of the whole picture's rows, "" where the model is not shown it; tile_tokens: rows and
    columns of what stands in front of each tile's, none in the releases that had no such tokens.
    """

    side: int
    longest: int
    enlarge: bool
    global_token: str
    tile_tokens: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        self.check_squares(self.longest)
        tokens = self.tile_tokens
        if tokens and (len(tokens) < self.longest or min(map(len, tokens)) < self.longest):
            raise ConfigError(
                f"pictures of {self.longest}x{self.longest} tiles need a token for each, r1c1 to "
                f"r{self.longest}c{self.longest}; vlm_extra_tokens has {len(tokens)}x{min(map(len, tokens))} of them"
            )

    def image(self, size: Size, geometry: PatchGeometry, context: ImageContext) -> ImageLayout:
        """The whole picture, where the model has a token for it and it is cut at all, and its tiles row by row.

        Each image of several is announced by its number.
        """
        arrangement = self.arrangement(size)
        tiles = split(arrangement, Size(self.side, self.side), geometry, "bicubic")
        projected = geometry.projected(tiles[0].grid)
        rows = ImagePlaceholder(projected.area)
        pieces: list[Piece] = [] if context.alone else [Marker(f"<image: {context.index}>", isolated=False)]
        if self.global_token:
            pieces += [Token(self.global_token), rows]
            if arrangement == (1, 1):
                return ImageLayout(size, tiles, tuple(pieces), arrangement, projected=(projected,))
            tiles = (self._whole(tiles[0]), *tiles)
        for row in range(arrangement.h):
            for column in range(arrangement.w):
                pieces += [Token(self.tile_tokens[row][column]), rows] if self.tile_tokens else [rows]
        return ImageLayout(size, tiles, tuple(pieces), arrangement, projected=(projected,) * len(tiles))

    def arrangement(self, size: Size) -> Grid:
        """Rows and columns of tiles: those of the largest `longest` that is within `most`."""
        longest = self.longest
        while self.most is not None and self._fitted(size, longest).area > self.most:
            longest -= 1
        return self._fitted(size, longest)

    def _fitted(self, size: Size, longest: int) -> Grid:
        """The reference's rounding can give the shorter side one tile more than `longest`; that one is left out."""
        long, short = max(size), min(size)
        along = longest if self.enlarge else min(longest, math.ceil(long / self.side))
        scale = along * self.side / long
        across = min(longest, max(1, math.ceil(short * scale / self.side)))
        return Grid(across, along) if size.width >= size.height else Grid(along, across)

    def _whole(self, tile: Tile) -> Tile:
        """The canvas of `tile` once more, as torchvision resizes a tensor."""
        whole = Resize(Size(self.side, self.side), "bilinear", in_float=True)
        return Tile((*tile.steps, whole), Box(0, 0, self.side, self.side), tile.grid)
