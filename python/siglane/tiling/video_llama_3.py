"""VideoLLaMA3: pictures and frames at their own resolution, with bounds of their own (formats.md 12).

Sources: transformers 5.19 `models/video_llama_3`, and DAMO-NLP-SG/VideoLLaMA3 `image_processing_videollama3.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from siglane.tiling.bounds import Bounds, bounds_within, fitted, multiples
from siglane.tiling.rule import Budgeted, ImageBudget, ImageContext, LayoutRule, PatchGeometry, whole_tile
from siglane.types import Grid, ImageLayout, ImagePlaceholder, Marker, Medium, MergedFirst, Resample, Size, VideoSize


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeFrames(LayoutRule):
    """picture, frame: their bounds; shared: the authors' rules, by which all pictures and frames of a request have
    `most` together; drops_still: as of `MergedFirst`. Set by `among`: share: how many pictures and frames there are;
    shrink: what all sides are divided by where a request has pictures and videos, 0 elsewhere.
    """

    picture: Bounds
    frame: Bounds
    resample: Resample
    drops_still: bool
    shared: bool = False
    share: int = 1
    shrink: float = 0.0

    def among(self, media: Sequence[Medium]) -> LayoutRule:
        if not self.shared:
            return self
        shown = [(self._bounds(one).factor, *_frames(one)) for one in media]
        if len({factor for factor, _, _ in shown}) == 1:
            return replace(self, share=sum(count for _, _, count in shown))
        rows = sum(count * math.ceil(size.height / side) * math.ceil(size.width / side) for side, size, count in shown)
        most = (self.picture.most or 0) // self.picture.factor**2
        return replace(self, shrink=max(1.0, math.sqrt(rows / most)))

    def image(self, size: Size, geometry: PatchGeometry, context: ImageContext) -> ImageLayout:
        return self._laid_out(size, geometry, self.share)

    def video(self, video: VideoSize, geometry: PatchGeometry) -> ImageLayout:
        """Every frame behind the second at which it is shown; with times that nobody knows, one a second."""
        one = self._laid_out(video, geometry, self.share if self.shared else video.frames)
        texts = [f"{',' * bool(n)}Time {second:.1f}s:" for n, second in enumerate(video.seconds or range(video.frames))]
        pieces = tuple(piece for text in texts for piece in (Marker(text, isolated=False), *one.pieces))
        tiles = tuple(replace(one.tiles[0], frame=frame) for frame in range(video.frames))
        return replace(
            one, tiles=tiles, pieces=pieces, assembly=MergedFirst(self.drops_still), frames=video.frames,
            projected=one.projected * video.frames,
        )  # fmt: skip

    def within(self, budget: ImageBudget) -> Budgeted:
        """`bounds_within`, for each picture and frame; what a video's frames, or a request, have together stays."""
        own = None if self.shared else self.picture.most
        least, most, detail = bounds_within(budget, self.picture.factor, self.picture.least, own)
        picture, frame = self.picture.within(budget), self.frame.within(budget)
        picture = replace(picture, least=least, most=self.picture.most if self.shared else most)
        return Budgeted(replace(self, picture=picture, frame=frame), detail)

    def _laid_out(self, medium: Medium, geometry: PatchGeometry, share: int) -> ImageLayout:
        (size, _), bounds = _frames(medium), self._bounds(medium)
        tile = whole_tile(self._target(size, bounds, share), self.resample, geometry)
        rows = Grid(tile.canvas.height // bounds.factor, tile.canvas.width // bounds.factor)
        assembly, pieces = None if rows == tile.grid else MergedFirst(), (ImagePlaceholder(rows.area),)
        return ImageLayout(size, (tile,), pieces, Grid(1, 1), assembly, projected=(rows,))

    def _target(self, size: Size, bounds: Bounds, share: int) -> Size:
        if self.shrink:
            beta, whole = self.shrink, math.floor if self.shrink > 1 else round
            found = multiples(size, bounds.factor, lambda side: whole(side / beta / bounds.factor))
        else:
            found = fitted(size, bounds, bounds.upper(share), again=self.shared)
        return found if bounds.allows(found) else fitted(size, replace(bounds, least=0), bounds.limit)

    def _bounds(self, medium: Medium) -> Bounds:
        return self.frame if isinstance(medium, VideoSize) else self.picture


def _frames(medium: Medium) -> tuple[Size, int]:
    """Pixels of each, and how many there are."""
    return medium[:2] if isinstance(medium, VideoSize) else (medium, 1)
