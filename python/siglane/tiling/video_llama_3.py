"""VideoLLaMA3: pictures and frames at their own resolution, with bounds of their own (formats.md 12).

Sources: transformers 5.19 `models/video_llama_3`, and DAMO-NLP-SG/VideoLLaMA3 `image_processing_videollama3.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from siglane.tiling.bounds import Bounds, fitted, multiples
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
        shown = [self._shown(one) for one in media]
        if len({bounds.factor for _, _, bounds in shown}) == 1:
            return replace(self, share=sum(count for _, count, _ in shown))
        rows = sum(count * math.prod(math.ceil(side / one.factor) for side in size) for size, count, one in shown)
        most = (self.picture.most or 0) // self.picture.factor**2
        return replace(self, shrink=max(1.0, math.sqrt(rows / most)))

    def image(self, size: Size, geometry: PatchGeometry, context: ImageContext) -> ImageLayout:
        return self._laid_out(size, geometry)

    def video(self, video: VideoSize, geometry: PatchGeometry) -> ImageLayout:
        """Every frame behind the second at which it is shown; with times that nobody knows, one a second."""
        one = self._laid_out(video, geometry)
        texts = [f"{',' * bool(n)}Time {second:.1f}s:" for n, second in enumerate(video.seconds or range(video.frames))]
        pieces = tuple(piece for text in texts for piece in (Marker(text, isolated=False), *one.pieces))
        return replace(
            one, tiles=one.tiles[0].in_frames(video.frames), pieces=pieces, assembly=MergedFirst(self.drops_still),
            frames=video.frames, projected=one.projected * video.frames,
        )  # fmt: skip

    def within(self, budget: ImageBudget) -> Budgeted:
        """`bounds_within`, for each picture and frame; what a video's frames, or a request, have together stays."""
        picture, detail = self.picture.within(budget, together=self.shared)
        frame, _ = self.frame.within(budget, together=True)
        return Budgeted(replace(self, picture=picture, frame=frame), detail)

    def _laid_out(self, medium: Medium, geometry: PatchGeometry) -> ImageLayout:
        """Of a video, one of its frames."""
        size, count, bounds = self._shown(medium)
        if self.shrink:
            whole = math.floor if self.shrink > 1 else round
            found = multiples(size, bounds.factor, lambda side: whole(side / self.shrink / bounds.factor))
            target = bounds.limited(found, size)
        else:
            target = fitted(size, bounds, self.share if self.shared else count, again=self.shared)
        tile = whole_tile(target, self.resample, geometry)
        rows = Grid(target.height // bounds.factor, target.width // bounds.factor)
        assembly = None if rows == tile.grid else MergedFirst()
        return ImageLayout(size, (tile,), (ImagePlaceholder(rows.area),), Grid(1, 1), assembly, projected=(rows,))

    def _shown(self, medium: Medium) -> tuple[Size, int, Bounds]:
        """Pixels of each picture or frame, how many there are, and their bounds."""
        return (*medium[:2], self.frame) if isinstance(medium, VideoSize) else (medium, 1, self.picture)
