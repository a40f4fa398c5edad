"""What became of one image or video of a request, as every interface reports it."""

from __future__ import annotations

from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic reads no other on Python 3.11

from siglane.tiling.rule import ImageBudget
from siglane.types import Detail, ImageLayout


class DetailReport(TypedDict):
    requested: Detail
    applied: Detail


class ImageReport(TypedDict):
    """What the model saw: the size in pixels (of a video's first frame), the patch grid of every tile, the prompt
    tokens taken. frames: of a video; limits: the budget that was in force, by name, beside the checkpoint's own."""

    width: int
    height: int
    frames: NotRequired[int]
    tiles: int
    grids: list[tuple[int, int]]
    tokens: int
    detail: DetailReport
    limits: dict[str, Any]


def report_image(layout: ImageLayout, requested: Detail, applied: Detail, image_limits: ImageBudget) -> ImageReport:
    """requested: the caller's word; applied, image_limits: what `layout` was made within."""
    report: ImageReport = {
        "width": layout.source.width,
        "height": layout.source.height,
        "tiles": len(layout.tiles),
        "grids": [(grid.h, grid.w) for grid in layout.grids],
        "tokens": layout.image_tokens,
        "detail": {"requested": requested, "applied": applied},
        "limits": image_limits.limits,
    }
    if layout.frames:
        report["frames"] = layout.frames
    return report
