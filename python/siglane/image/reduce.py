"""JPEGs at half, a quarter or an eighth of their size, where the layout makes them smaller still (docs/budgets.md).

A JPEG's blocks of 8 x 8 pixels can be decoded to 4, 2 or 1 pixels a side: most of the work falls away. What is left of
the shrinking is done by the filter that the layout names. The more of it is left, the less the two ways differ.
"""

from __future__ import annotations

import math

from siglane.image.header import Header
from siglane.types import ImageLayout, Region, Resize, Size

SHRINKS = (8, 4, 2)
# how often smaller a filter still has to make a picture: then pixels differ by at most 0.5 of 255 on average, with the
# worst of filters and pictures tried (`python -m benchmark.image_decode`); others (box, nearest) are too sharp for it
LEFT_OVER = 3.5
FILTERS = ("bilinear", "hamming", "bicubic", "lanczos")


def shrink_of(layout: ImageLayout) -> int:
    """1, 2, 4 or 8: the part of its size at which a JPEG may be decoded for `layout`; 1 where a tile is cut from the
    picture as it is, or drawn in a way that this changes too much."""
    first = {tile.steps[0] if tile.steps else None for tile in layout.tiles}
    least = math.inf
    for step in first:
        if layout.frames or not isinstance(step, Resize) or step.in_float or step.resample not in FILTERS:
            return 1
        least = min(least, layout.source.width / step.size.width, layout.source.height / step.size.height)
    return next((shrink for shrink in SHRINKS if shrink * LEFT_OVER <= least), 1)


def reduced_size(stored: Size, shrink: int) -> Size:
    """What libjpeg makes of a JPEG of this size: the last block's pixels may lie outside the picture."""
    return Size(math.ceil(stored.width / shrink), math.ceil(stored.height / shrink))


def region_of(header: Header, shrink: int) -> Region:
    """Where in the upright reduced pixels the picture lies."""
    stored, reduced = header.stored, reduced_size(header.stored, shrink)
    # what the last column and row show beyond the picture; turning brings it to other sides
    right, bottom = reduced.width - stored.width / shrink, reduced.height - stored.height / shrink
    left, top = {2: (right, 0.0), 3: (right, bottom), 4: (0.0, bottom), 6: (bottom, 0.0), 7: (bottom, right)}.get(
        header.orientation, (0.0, right if header.orientation == 8 else 0.0)
    )
    return Region(left, top, left + header.upright.width / shrink, top + header.upright.height / shrink)
