"""What became of one image or video of a request, as every interface reports it."""

from __future__ import annotations

from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic reads no other on Python 3.11

from siglane.types import Detail


class DetailReport(TypedDict):
    requested: Detail
    applied: Detail


class ImageReport(TypedDict):
    """What the model saw: the size in pixels (of a video's first frame), the patch grid of every tile, the prompt
    tokens taken. frames: of a video; limits: those that were in force, by name, beside the checkpoint's own."""

    width: int
    height: int
    frames: NotRequired[int]
    tiles: int
    grids: list[tuple[int, int]]
    tokens: int
    detail: DetailReport
    limits: dict[str, Any]
