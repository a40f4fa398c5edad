"""What a family states about its image path: one rule that turns a size into a layout, in integers only.

Rules are frozen data. They live beside each other in this folder, one file each; a family picks one and fills in its
numbers. No rule reads pixels or weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from siglane.errors import ConfigError, UserError
from siglane.tiling.merge import PatchMerge, projected_grid
from siglane.types import Box, Detail, Grid, ImageLayout, Medium, Resample, Resize, Size, Step, Tile, VideoSize

LIMITS = ("max_pixels", "min_pixels", "max_num_patches", "max_tiles", "grid_pinpoints")
MOST_TILES = 1024  # of one picture; more is a mistake, and every candidate grid is looked at for every image


@dataclass(frozen=True, slots=True)
class PatchGeometry:
    """How pixels become patches and patches become projector rows."""

    patch_size: int
    projector: PatchMerge

    def grid(self, pixels: Size) -> Grid:
        """Whole patches of an area; what is left over at the right and bottom is never read."""
        return Grid(pixels.height // self.patch_size, pixels.width // self.patch_size)

    def projected(self, grid: Grid) -> Grid:
        return projected_grid(grid, self.projector)


@dataclass(frozen=True, slots=True)
class ImageContext:
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

    `siglane`'s flags and environment variables are generated from these fields; a server's budget is the ceiling of
    its clients' (`under`), that of an `LLM` what its caller overrides (`over`).
    """

    detail: Detail = field(
        default="auto", metadata={"help": "of images that name none: low, high, original or auto (the checkpoint's)"}
    )
    max_pixels: int | None = field(
        default=None, metadata={"help": "pixels of a picture once resized, for models of native resolution"}
    )
    min_pixels: int | None = field(
        default=None, metadata={"help": "smaller pictures are enlarged to it, for models of native resolution"}
    )
    max_num_patches: int | None = field(default=None, metadata={"help": "patches of a picture, for NaFlex models"})
    max_tiles: int | None = field(
        default=None, metadata={"help": "tiles of a picture, the whole one not counted, for models that cut tiles"}
    )
    grid_pinpoints: tuple[tuple[int, int], ...] | None = field(
        default=None, metadata={"help": "HEIGHT:WIDTH resolutions to choose from, for models with such a list"}
    )

    def __post_init__(self) -> None:
        for name in LIMITS[:-1]:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}", code="invalid_budget", param=name)
        pinpoints = self.grid_pinpoints
        if pinpoints is not None and (not pinpoints or min(map(min, pinpoints)) < 1):
            message = f"grid_pinpoints must be pairs of at least 1 pixel, got {list(pinpoints)}"
            raise UserError(message, code="invalid_budget", param="grid_pinpoints")

    @property
    def limits(self) -> dict[str, Any]:
        """The limits that are set, by name."""
        return {name: value for name in LIMITS if (value := getattr(self, name)) is not None}

    def over(self, common: ImageBudget) -> ImageBudget:
        """These wishes, and those of `common` where there are none."""
        detail = common.detail if self.detail == "auto" else self.detail
        return ImageBudget(detail=detail, **(common.limits | self.limits))

    def under(self, ceiling: ImageBudget) -> ImageBudget:
        """These wishes where they ask for less than `ceiling`, whose detail is only a default. UserError when none of
        the resolutions wished for is among the ceiling's."""
        limits = ceiling.limits | self.limits
        for name in ("max_pixels", "max_num_patches", "max_tiles"):
            if name in ceiling.limits:
                limits[name] = min(limits[name], ceiling.limits[name])
        if ceiling.max_pixels is not None and "min_pixels" in limits:
            limits["min_pixels"] = min(limits["min_pixels"], ceiling.max_pixels)
        if self.grid_pinpoints is not None and ceiling.grid_pinpoints is not None:
            limits["grid_pinpoints"] = tuple(pair for pair in self.grid_pinpoints if pair in ceiling.grid_pinpoints)
            if not limits["grid_pinpoints"]:
                message = f"grid_pinpoints must be among {list(ceiling.grid_pinpoints)}"
                raise UserError(message, code="invalid_budget", param="grid_pinpoints")
        return ImageBudget(detail=ceiling.detail if self.detail == "auto" else self.detail, **limits)

    def refuse_others(self, *known: str) -> None:
        """UserError for a limit that is set and does not apply to this family: nothing is ignored in silence."""
        for name in self.limits:
            if name not in known:
                usable = f"it knows {', '.join(known)}" if known else "its images have one size"
                raise UserError(f"{name} does not apply to this model; {usable}", code="unsupported_budget", param=name)


CHECKPOINT_LIMITS = ImageBudget()


class Budgeted(NamedTuple):
    """A rule within a budget, and the detail that was really applied."""

    rule: LayoutRule
    detail: Detail


class LayoutRule(Protocol):
    """A family's way from sizes to layouts."""

    def image(self, size: Size, geometry: PatchGeometry, context: ImageContext) -> ImageLayout:
        """The layout of a picture of `size` pixels."""
        ...

    def among(self, media: Sequence[Medium]) -> LayoutRule:
        """The rule for one of these `media` of a request, where they share what one alone may cost."""
        return self

    def video(self, video: VideoSize, geometry: PatchGeometry) -> ImageLayout:
        """The layout of a video. UserError `video_unsupported` when the family reads none, as a rule that does not
        define it."""
        raise no_video()

    def within(self, budget: ImageBudget) -> Budgeted:
        """The same rule with a caller's limits. UserError names a limit that does not apply or leaves no image."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TiledRule(LayoutRule):
    """most: tiles of a picture, the whole one not counted; None for as many as the checkpoint says."""

    most: int | None = None

    def check_squares(self, along: int) -> None:
        """ConfigError for pictures of so many tiles along each side that no model has them."""
        if along**2 > MOST_TILES:
            raise ConfigError(f"pictures of {along}x{along} tiles; at most {MOST_TILES} are possible")

    def within(self, budget: ImageBudget) -> Budgeted:
        """`max_tiles` is `most`; `low` is the picture in one tile, every other detail the checkpoint's choice."""
        budget.refuse_others("max_tiles")
        if budget.detail == "low":
            return Budgeted(replace(self, most=1), "low")
        return Budgeted(replace(self, most=budget.max_tiles), "auto" if budget.detail == "auto" else "high")


def known_limits(rule: LayoutRule) -> list[str]:
    """The names of `ImageBudget`'s limits that apply to this family."""
    known, least = [], ImageBudget(max_pixels=1, min_pixels=1, max_num_patches=1, max_tiles=1, grid_pinpoints=((1, 1),))
    for name, value in least.limits.items():
        try:
            rule.within(replace(ImageBudget(), **{name: value}))
        except UserError as error:
            if error.code == "unsupported_budget":
                continue
        known.append(name)
    return known


def whole_tile(pixels: Size, resample: Resample, geometry: PatchGeometry, before: tuple[Step, ...] = ()) -> Tile:
    """The whole image resized to `pixels`, aspect ignored. before: the steps in front of that."""
    return Tile((*before, Resize(pixels, resample)), Box(0, 0, pixels.width, pixels.height), geometry.grid(pixels))


def split(
    arrangement: Grid, tile: Size, geometry: PatchGeometry, resample: Resample, before: tuple[Step, ...] = ()
) -> tuple[Tile, ...]:
    """The image resized to rows and columns of tiles of `tile` pixels, cut row by row. before: as of `whole_tile`."""
    canvas = Size(arrangement.w * tile.width, arrangement.h * tile.height)
    return tuple(
        Tile((*before, Resize(canvas, resample)), Box(x, y, x + tile.width, y + tile.height), geometry.grid(tile))
        for y in range(0, canvas.height, tile.height)
        for x in range(0, canvas.width, tile.width)
    )


def lay_out(media: Sequence[Medium], rules: Sequence[LayoutRule], geometry: PatchGeometry) -> tuple[ImageLayout, ...]:
    """The layouts of all images and videos of one request, each by its own rule. UserError as `LayoutRule.video`.

    Videos do not count when images are: one image beside a video is tiled as if alone, as the references do.
    """
    images = sum(not isinstance(medium, VideoSize) for medium in media)
    found: list[ImageLayout] = []
    for medium, rule in zip(media, [rule.among(media) for rule in rules], strict=True):
        if isinstance(medium, VideoSize):
            found.append(rule.video(medium, geometry))
        else:
            index = sum(layout.frames == 0 for layout in found)
            found.append(rule.image(medium, geometry, ImageContext(index, images)))
    return tuple(found)


def no_images() -> UserError:
    return UserError("this model reads text only, no images or videos", code="images_unsupported")


def no_video() -> UserError:
    return UserError("this model reads images, not videos; send frames as images", code="video_unsupported")
