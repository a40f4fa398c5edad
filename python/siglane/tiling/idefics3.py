"""Idefics3's tiles: every picture at one length, then at whole squares, cut row by row, all of it last (formats.md 11).

Source: transformers 5.19 `models/idefics3/image_processing_pil_idefics3.py`, `models/smolvlm/processing_smolvlm.py`.
The quotients are floats there and here: their rounding decides how many tiles a picture has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta

from siglane.errors import ConfigError
from siglane.tiling.rule import ImageContext, PatchGeometry, TiledRule, no_video, split
from siglane.tiling.spoken import in_words, minutes
from siglane.types import Grid, ImageLayout, ImagePlaceholder, Marker, Piece, Resample, Resize, Size, Token, VideoSize

LONGEST = 4096  # pixels of a side; transformers shrinks what is longer once more
UNKNOWN_RATE = 24  # frames a second of a video that does not say


@dataclass(frozen=True, slots=True, kw_only=True)
class LongestEdge(TiledRule):
    """longest: pixels of the longer side of a picture before it is cut into squares (tile) where `splits`, less by
    whole tiles where they are more than `most`, as the models' cards say to do; frame_longest: of frames, which are not
    cut, None without videos; around, whole: what stands around a tile's rows, and in front of the whole picture's."""

    longest: int
    tile: Size
    splits: bool
    resample: Resample
    frame_longest: int | None
    around: str
    whole: str

    def __post_init__(self) -> None:
        if (longest := max(self.longest, self.frame_longest or 0)) > LONGEST:
            raise ConfigError(f"pictures of {longest} pixels; at most {LONGEST} are possible")
        self.check_squares(math.ceil(longest / self.tile.width))

    def image(self, size: Size, geometry: PatchGeometry, context: ImageContext) -> ImageLayout:
        """A picture of one tile is not shown as a whole again; it is resized twice all the same."""
        longest, side = self.longest, self.tile.width
        while self.most is not None and longest > side and self.arrangement(size, longest).area > self.most:
            longest = (longest - 1) // side * side
        arrangement, pieces = self.arrangement(size, longest), list[Piece]()
        before = (Resize(_fitted(size, longest), self.resample),)
        tiles = split(arrangement, self.tile, geometry, self.resample, before)
        if arrangement.area > 1:
            tiles += split(Grid(1, 1), self.tile, geometry, self.resample, tiles[0].steps)
            for row in range(1, arrangement.h + 1):
                for column in range(1, arrangement.w + 1):
                    pieces += self._block(geometry, f"<row_{row}_col_{column}>")[:-1]
                pieces.append(Marker("\n", isolated=False))
            pieces.append(Marker("\n", isolated=False))
        pieces += self._block(geometry, self.whole)
        projected = (geometry.projected(tiles[0].grid),) * len(tiles)
        return ImageLayout(size, tiles, tuple(pieces), arrangement, projected=projected)

    def video(self, video: VideoSize, geometry: PatchGeometry) -> ImageLayout:
        """Every frame is a picture of one tile behind its time."""
        if self.frame_longest is None:
            raise no_video()
        seconds = video.seconds or tuple(frame / UNKNOWN_RATE for frame in range(video.frames))
        count, length = in_words(video.frames), timedelta(seconds=int(video.duration or seconds[-1]))
        words = f"You are provided the following series of {count} frames from a {length} [H:MM:SS] video.\n"
        pieces: list[Piece] = [Marker(words, isolated=False)]
        for second in seconds:
            pieces.append(Marker(f"\nFrame from {minutes(second)}:", isolated=False))
            pieces += self._block(geometry, self.whole)
        pieces.append(Marker("\n\n", isolated=False))
        before = (Resize(_fitted(video.size, self.frame_longest), self.resample),)
        (whole,) = split(Grid(1, 1), self.tile, geometry, self.resample, before)
        tiles, projected = whole.in_frames(video.frames), (geometry.projected(whole.grid),) * video.frames
        return ImageLayout(video.size, tiles, tuple(pieces), Grid(1, 1), frames=video.frames, projected=projected)

    def arrangement(self, size: Size, longest: int) -> Grid:
        """Rows and columns of tiles of a picture at that length."""
        if not self.splits:
            return Grid(1, 1)
        (width, height), side = _fitted(size, longest), self.tile.width
        aspect, along = width / height, math.ceil(max(width, height) / side)
        across = math.ceil(int(along * side / aspect if width >= height else along * side * aspect) / side)
        return Grid(across, along) if width >= height else Grid(along, across)

    def _block(self, geometry: PatchGeometry, place: str) -> list[Piece]:
        rows = ImagePlaceholder(geometry.projected(geometry.grid(self.tile)).area)
        return [Token(self.around, or_text=True), Token(place, or_text=True), rows, Token(self.around, or_text=True)]


def _fitted(size: Size, longest: int) -> Size:
    """`size` with that longer side and an even shorter one."""
    aspect, wide = size.width / size.height, size.width >= size.height
    across = int(longest / aspect if wide else longest * aspect)
    across = max(1, across + across % 2)
    return Size(longest, across) if wide else Size(across, longest)
