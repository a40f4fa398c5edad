"""What a family states about its image path: one rule that turns a size into a layout, in integers only.

Rules are frozen data. They live beside each other in this folder, one file each; a family picks one and fills in its
numbers. No rule reads pixels or weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from siglane.config.projector import ProjectorConfig, projected_grid
from siglane.errors import UserError
from siglane.types import Clip, Detail, Grid, ImageLayout, Size


@dataclass(frozen=True, slots=True)
class Cells:
    """How pixels become patches and patches become projector rows."""

    patch_size: int
    projector: ProjectorConfig

    def grid(self, pixels: Size) -> Grid:
        """Whole patches of an area; what is left over at the right and bottom is never read."""
        return Grid(pixels.height // self.patch_size, pixels.width // self.patch_size)

    def projected(self, grid: Grid) -> Grid:
        return projected_grid(grid, self.projector)


@dataclass(frozen=True, slots=True)
class Place:
    """The image is number `index` of the `count` images of its request."""

    index: int = 0
    count: int = 1

    @property
    def alone(self) -> bool:
        return self.count == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageBudget:
    """What a caller allows one image to cost. None: what the checkpoint says. `detail` is OpenAI's field.

    max_pixels, min_pixels: of the resized picture, per frame of a video (native-resolution towers); max_num_patches:
    of the patch grid (NaFlex); max_tiles: of the dynamic grid, the whole image not counted; grid_pinpoints: the
    resolutions (height, width) in pixels to choose from (anyres).
    """

    detail: Detail = "auto"
    max_pixels: int | None = None
    min_pixels: int | None = None
    max_num_patches: int | None = None
    max_tiles: int | None = None
    grid_pinpoints: tuple[tuple[int, int], ...] | None = None

    def refuse_others(self, *known: str) -> None:
        """UserError for a limit that is set and does not apply to this family: nothing is ignored in silence."""
        limits = ("max_pixels", "min_pixels", "max_num_patches", "max_tiles", "grid_pinpoints")
        for name in limits:
            if name not in known and getattr(self, name) is not None:
                usable = f"it knows {', '.join(known)}" if known else "its images have one size"
                raise UserError(f"{name} does not apply to this model; {usable}", code="unsupported_budget", param=name)


class Budgeted(NamedTuple):
    """A rule within a budget, and the detail that was really applied."""

    rule: LayoutRule
    detail: Detail


class LayoutRule(Protocol):
    """A family's way from sizes to layouts."""

    def image(self, size: Size, cells: Cells, place: Place) -> ImageLayout:
        """The layout of a picture of `size` pixels."""
        ...

    def clip(self, clip: Clip, cells: Cells) -> ImageLayout:
        """The layout of a video. UserError `video_unsupported` when the family reads none."""
        ...

    def within(self, budget: ImageBudget) -> Budgeted:
        """The same rule with a caller's limits. UserError names a limit that does not apply or leaves no image."""
        ...


def no_video() -> UserError:
    return UserError("this model reads images, not videos; send frames as images", code="video_unsupported")
