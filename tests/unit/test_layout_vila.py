"""VILA's layouts follow from the size alone, and count exactly the rows that the projector gives."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import combinations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from siglane.config.projector import (
    ProjectorConfig,
    pixel_shuffle_projector,
    vila_projector,
)
from siglane.errors import UserError
from siglane.projector.mlp import Projector
from siglane.tiling.merge import projected_grid
from siglane.tiling.rule import MOST_TILES, ImageBudget, ImageContext, PatchGeometry
from siglane.tiling.squash import Squash
from siglane.tiling.vila import Tiling, VilaTiling, closest_tile_grid, tile_bounds
from siglane.types import (
    Box,
    Detail,
    Grid,
    ImageLayout,
    ImagePlaceholder,
    Marker,
    MergedScales,
    Pad,
    Resize,
    Size,
    Tile,
    VideoSize,
)

MANY = settings(max_examples=300, deadline=None, database=None)
SOME = settings(max_examples=150, deadline=None, database=None)

SIZES = st.builds(Size, st.integers(1, 6000), st.integers(1, 6000))
TILE = Size(448, 448)
TILINGS: tuple[Tiling, ...] = ("squash", "pad", "dynamic", "dynamic_s2")
KINDS = ("identity", "linear", "mlp2x_gelu", "mlp_downsample", "mlp_downsample_3x3_fix", "mlp_downsample_3x3_s2")


def rule(tiling: Tiling, tile: Size = TILE, *, least: int = 1, most: int = 12) -> VilaTiling:
    scales = (tile.width, 2 * tile.width, 3 * tile.width) if tiling == "dynamic_s2" else ()
    return VilaTiling(
        tile=tile, resample="bicubic", tiling=tiling, min_tiles=least, max_tiles=most,
        s2_scales=scales, fill=(127, 127, 127),
    )  # fmt: skip


# of the dynamic grids in use: Lite's own and smaller ones, dynamic_s2 over two and over three scales
BOUNDS = ((1, 1), (1, 2), (1, 6), (1, 12), (1, 16), (4, 12), (9, 12))

LITE = rule("dynamic"), vila_projector("mlp_downsample_3x3_fix", input_size=3, output_size=4)
S2 = rule("dynamic_s2"), vila_projector("mlp_downsample", input_size=9, output_size=4)


def layout_of(
    size: Size, family: tuple[VilaTiling, ProjectorConfig], *, patch: int = 14, alone: bool = True
) -> ImageLayout:
    tiling, projector = family
    return tiling.image(size, PatchGeometry(patch, projector), ImageContext(0, 1 if alone else 2))


@cache
def built(kind: str) -> Projector:
    return Projector(vila_projector(kind, input_size=3, output_size=2)).requires_grad_(False)


def projector_grids(layout: ImageLayout, tiling: Tiling) -> list[Grid]:
    """What the projector sees: every tile, or the stitched map of dynamic_s2 cut into tiles again."""
    if tiling == "dynamic_s2":
        return [layout.tiles[0].grid] * layout.arrangement.area
    return list(layout.grids)


def without_pixels(layout: ImageLayout) -> ImageLayout:
    """The same layout drawn with one filter and one colour."""
    plain = [
        replace(
            tile,
            steps=tuple(
                replace(step, resample="box") if isinstance(step, Resize) else replace(step, fill=(0, 0, 0))
                for step in tile.steps
            ),
        )
        for tile in layout.tiles
    ]
    return replace(layout, tiles=tuple(plain))


def canvas_area(tiles: tuple[Tile, ...]) -> int:
    """Pixels covered by `tiles`, which must not overlap."""
    for one, other in combinations((tile.box for tile in tiles), 2):
        beside = one.right <= other.left or other.right <= one.left
        assert beside or one.bottom <= other.top or other.bottom <= one.top, (one, other)
    return sum((box.right - box.left) * (box.bottom - box.top) for box in (tile.box for tile in tiles))


class TestVectors:
    """formats.md 5.4, whose numbers come from VILA's own code."""

    @pytest.mark.parametrize(
        ("size", "columns_rows", "tiles", "tokens"),
        [
            (Size(448, 448), (1, 1), 1, 121),
            (Size(640, 480), (4, 3), 13, 1573),
            (Size(1000, 1000), (3, 3), 10, 1210),
            (Size(1920, 1080), (4, 2), 9, 1089),
            (Size(3000, 300), (10, 1), 11, 1331),
        ],
    )
    def test_lite(self, size: Size, columns_rows: tuple[int, int], tiles: int, tokens: int) -> None:
        layout = layout_of(size, LITE)
        columns, rows = columns_rows
        assert layout.arrangement == Grid(h=rows, w=columns)
        assert len(layout.tiles) == tiles
        assert layout.image_tokens == tokens
        assert set(layout.grids) == {Grid(32, 32)}
        assert layout.patches == tiles * 1024

    @pytest.mark.parametrize(
        ("size", "columns_rows", "tokens"),
        [
            (Size(448, 448), (3, 3), 2304),
            (Size(640, 480), (4, 3), 3072),
            (Size(1000, 1000), (3, 3), 2304),
            (Size(1920, 1080), (4, 3), 3072),
            (Size(3000, 300), (10, 1), 2560),
        ],
    )
    def test_dynamic_s2(self, size: Size, columns_rows: tuple[int, int], tokens: int) -> None:
        layout = layout_of(size, S2)
        columns, rows = columns_rows
        assert layout.arrangement == Grid(h=rows, w=columns)
        assert layout.image_tokens == tokens
        assert [tile.canvas for tile in layout.tiles[:5]] == [Size(448, 448)] + [Size(896, 896)] * 4
        assert len(layout.tiles) == 5 + columns * rows

    def test_a_lite_thumbnail_comes_last(self) -> None:
        *dynamic, last = layout_of(Size(640, 480), LITE).tiles
        assert {tile.canvas for tile in dynamic} == {Size(4 * 448, 3 * 448)}
        assert (last.canvas, last.box) == (Size(448, 448), (0, 0, 448, 448))

    def test_tiles_are_cut_row_by_row(self) -> None:
        boxes = [tile.box for tile in layout_of(Size(1920, 1080), LITE).tiles[:-1]]
        assert boxes == sorted(boxes, key=lambda box: (box.top, box.left))
        assert boxes[1] == (448, 0, 896, 448)

    def test_a_newline_follows_every_block_of_features(self) -> None:
        embedded, text = Marker("\n", isolated=True), Marker("\n", isolated=False)
        assert layout_of(Size(10, 10), LITE).pieces == (ImagePlaceholder(121), embedded, text)
        assert layout_of(Size(640, 480), LITE).pieces == (ImagePlaceholder(121), embedded, text) * 13
        assert layout_of(Size(640, 480), LITE, alone=False).pieces == (ImagePlaceholder(121), embedded)
        assert layout_of(Size(640, 480), S2).pieces == (ImagePlaceholder(3072), embedded)
        assert layout_of(Size(640, 480), S2, alone=False).pieces == (ImagePlaceholder(256), embedded)

    @pytest.mark.parametrize(
        ("side", "patch", "kind", "tokens"),
        [
            (384, 16, "mlp_downsample", 144),
            (384, 14, "mlp_downsample", 196),
            (448, 14, "mlp_downsample", 256),
            (384, 16, "mlp_downsample_3x3_fix", 64),
            (384, 14, "mlp_downsample_3x3_fix", 81),
            (448, 14, "mlp_downsample_3x3_fix", 121),
            (384, 14, "identity", 729),
            (384, 16, "mlp2x_gelu", 576),
        ],
    )
    def test_one_squashed_tile(self, side: int, patch: int, kind: str, tokens: int) -> None:
        family = rule("squash", Size(side, side)), vila_projector(kind, input_size=3, output_size=4)
        assert layout_of(Size(1234, 567), family, patch=patch).image_tokens == tokens


class TestLayout:
    @MANY
    @given(
        size=SIZES,
        tile_size=st.sampled_from([TILE, Size(28, 42), Size(75, 60)]),
        tiling=st.sampled_from(TILINGS),
        alone=st.booleans(),
    )
    @example(size=Size(1, 6000), tile_size=TILE, tiling="dynamic", alone=True)
    @example(size=Size(6000, 1), tile_size=TILE, tiling="dynamic_s2", alone=True)
    def test_tiles_cover_their_canvas_and_stay_inside(
        self, size: Size, tile_size: Size, tiling: Tiling, alone: bool
    ) -> None:
        layout = layout_of(size, (rule(tiling, tile_size), S2[1]), alone=alone)
        by_canvas: dict[Size, list[Tile]] = {}
        for tile in layout.tiles:
            left, top, right, bottom = tile.box
            assert 0 <= left < right <= tile.canvas.width
            assert 0 <= top < bottom <= tile.canvas.height
            assert (right - left, bottom - top) == tile_size
            assert tile.grid == Grid(h=tile_size.height // 14, w=tile_size.width // 14)
            by_canvas.setdefault(tile.canvas, []).append(tile)
        thumbnails = 1 if tiling == "dynamic" and len(layout.tiles) > 1 else 0
        scales = [tuple(tiles) for tiles in by_canvas.values()]
        assert sum(canvas_area(tiles) for tiles in scales) == sum(canvas.width * canvas.height for canvas in by_canvas)
        if alone and tiling.startswith("dynamic"):
            fixed = 5 if tiling == "dynamic_s2" else 0
            least, most = tile_bounds(rule(tiling))
            assert least <= layout.arrangement.area <= most
            assert len(layout.tiles) == fixed + layout.arrangement.area + thumbnails

    @MANY
    @given(size=SIZES, other=SIZES, tiling=st.sampled_from(TILINGS), alone=st.booleans())
    def test_only_the_size_counts(self, size: Size, other: Size, tiling: Tiling, alone: bool) -> None:
        config = rule(tiling)
        layout = layout_of(size, (config, S2[1]), alone=alone)
        layout_of(other, (config, S2[1]), alone=alone)
        assert layout_of(Size(*size), (config, S2[1]), alone=alone) == layout
        pixels_only = replace(config, resample="nearest", fill=(1, 2, 3))
        assert without_pixels(layout_of(size, (pixels_only, S2[1]), alone=alone)) == without_pixels(layout)
        assert layout.source == size

    @MANY
    @given(size=SIZES, tiling=st.sampled_from(TILINGS))
    def test_an_image_in_company_is_one_tile(self, size: Size, tiling: Tiling) -> None:
        layout = layout_of(size, (rule(tiling), S2[1]), alone=False)
        steps = (Resize(TILE, "bicubic"),)
        if tiling == "pad" and size.width != size.height:
            side = max(size)
            steps = (Pad(Size(side, side), (side - size.width) // 2, (side - size.height) // 2, (127,) * 3), *steps)
        assert layout.tiles == (Tile(steps, Box(0, 0, 448, 448), Grid(32, 32)),)
        assert layout.image_tokens == 256

    @SOME
    @given(
        size=SIZES,
        patch=st.integers(1, 3),
        grid=st.builds(Grid, st.integers(1, 9), st.integers(1, 9)),
        rest=st.tuples(st.integers(0, 2), st.integers(0, 2)),
        tiling=st.sampled_from(TILINGS),
        kind=st.sampled_from(KINDS),
        alone=st.booleans(),
    )
    def test_the_projector_gives_as_many_rows_as_are_counted(
        self, size: Size, patch: int, grid: Grid, rest: tuple[int, int], tiling: Tiling, kind: str, alone: bool
    ) -> None:
        leftover = [min(pixels, patch - 1) for pixels in rest]  # a tile's last pixels need not fill a patch
        tile = Size(grid.w * patch + leftover[0], grid.h * patch + leftover[1])
        layout = layout_of(size, (rule(tiling, tile), built(kind).config), patch=patch, alone=alone)
        grids = projector_grids(layout, tiling)
        features = torch.zeros(sum(grid.area for grid in grids), 3)
        assert layout.projector_grids == tuple(grids)
        assert sum(rows.area for rows in layout.projected) == layout.image_tokens
        assert built(kind)(features, grids).shape[0] == layout.image_tokens

    @SOME
    @given(grid=st.builds(Grid, st.integers(1, 40), st.integers(1, 40)), factor=st.integers(1, 4))
    def test_merged_grids_are_counted(self, grid: Grid, factor: int) -> None:
        features = torch.zeros(grid.area, 2)
        shuffle = pixel_shuffle_projector(factor, input_size=2, output_size=3)
        if grid.h % factor or grid.w % factor:
            with pytest.raises(ValueError, match="does not divide"):
                projected_grid(grid, shuffle)
        else:
            assert Projector(shuffle)(features, [grid]).shape[0] == projected_grid(grid, shuffle).area


def closest_by_the_book(size: Size, least: int, most: int, tile: int) -> tuple[int, int]:
    """The rule as VILA states it, written down again without looking at ours."""
    every = {(c, r) for n in range(least, most + 1) for c in range(1, n + 1) for r in range(1, n + 1)}
    allowed = sorted((pair for pair in every if least <= pair[0] * pair[1] <= most), key=lambda pair: pair[0] * pair[1])
    distances = [abs(size.width / size.height - columns / rows) for columns, rows in allowed]
    nearest = [pair for pair, distance in zip(allowed, distances, strict=True) if distance == min(distances)]
    winner = nearest[0]
    for columns, rows in nearest[1:]:
        if size.width * size.height > 0.5 * tile * tile * columns * rows:
            winner = (columns, rows)
    return winner


class TestClosestGrid:
    @MANY
    @given(size=SIZES, bounds=st.sampled_from(BOUNDS), tile=st.sampled_from([28, 384, 448]))
    @example(size=Size(900, 400), bounds=(1, 12), tile=448)
    @example(size=Size(1800, 800), bounds=(1, 12), tile=448)
    def test_is_the_one_the_book_names(self, size: Size, bounds: tuple[int, int], tile: int) -> None:
        least, most = bounds
        config = rule("dynamic", Size(tile, tile), least=least, most=most)
        assert closest_tile_grid(size, config) == closest_by_the_book(size, least, most, tile)

    @pytest.mark.parametrize(
        ("size", "columns_rows"),
        [
            (Size(900, 400), (2, 1)),  # 2.25 lies between 2:1, 4:2 and 5:2, too small for more than the first
            (Size(1350, 600), (4, 2)),  # more than half of 8 tiles
            (Size(1800, 800), (5, 2)),  # more than half of 10 tiles
            (Size(100, 100), (1, 1)),
            (Size(448, 448), (1, 1)),  # more than half of 1 tile, not of the 4 of 2:2
            (Size(700, 700), (2, 2)),
        ],
    )
    def test_a_tie_goes_to_the_larger_grid_that_the_pixels_half_fill(
        self, size: Size, columns_rows: tuple[int, int]
    ) -> None:
        assert closest_tile_grid(size, LITE[0]) == columns_rows

    @pytest.mark.parametrize("bounds", BOUNDS)
    def test_no_tie_depends_on_the_order_of_grids_of_equal_area(self, bounds: tuple[int, int]) -> None:
        """The reference sorts a set by area only, so the order among equal areas must not matter."""
        least, most = bounds
        ratios = {
            (columns, rows): Fraction(columns, rows)
            for columns in range(1, most + 1)
            for rows in range(1, most // columns + 1)
            if columns * rows >= least
        }
        for one, other in combinations(ratios, 2):
            if one[0] * one[1] == other[0] * other[1]:
                middle = (ratios[one] + ratios[other]) / 2
                assert min(abs(middle - ratio) for ratio in ratios.values()) < abs(middle - ratios[one]), (one, other)

    def test_grids_of_equal_area_are_tried_narrow_first(self) -> None:
        """Where the reference leaves the order open (a minimum above 1 with hardly a larger maximum) ours is fixed."""
        config = rule("dynamic", Size(28, 28), least=4, most=5)
        assert closest_tile_grid(Size(5, 8), config) == (1, 4)
        assert closest_tile_grid(Size(500, 800), config) == (2, 2)


class TestClip:
    @pytest.mark.parametrize("tiling", TILINGS)
    @pytest.mark.parametrize("frames", [1, 2, 8])
    def test_every_frame_is_one_tile_with_a_newline_behind_it(self, tiling: Tiling, frames: int) -> None:
        size = Size(640, 480)
        layout = rule(tiling).video(VideoSize(size, frames), PatchGeometry(14, S2[1]))
        still = layout_of(size, (rule(tiling), S2[1]), alone=False)
        assert [tile.frame for tile in layout.tiles] == list(range(frames))
        assert [replace(tile, frame=0) for tile in layout.tiles] == list(still.tiles) * frames
        assert layout.pieces == (ImagePlaceholder(256), Marker("\n", isolated=True)) * frames
        assert (layout.source, layout.frames, layout.arrangement) == (size, frames, Grid(1, 1))
        assert layout.assembly == (MergedScales((), 3) if tiling == "dynamic_s2" else None)
        assert (layout.image_tokens, layout.patches) == (256 * frames, 1024 * frames)


def refusal(code: str, param: str) -> pytest.RaisesExc[UserError]:
    return pytest.raises(UserError, check=lambda error: (error.code, error.param) == (code, param))


LIMITS = {
    "max_pixels": 10_000,
    "min_pixels": 100,
    "max_num_patches": 256,
    "max_tiles": 6,
    "grid_pinpoints": ((448, 448),),
}


class TestBudget:
    @pytest.mark.parametrize("name", LIMITS)
    def test_a_limit_the_family_does_not_know_is_refused_by_name(self, name: str) -> None:
        budget = ImageBudget(**{name: LIMITS[name]})
        with refusal("unsupported_budget", name) as caught:
            budget.refuse_others()
        assert caught.value.message == f"{name} does not apply to this model; its images have one size"
        others = [other for other in LIMITS if other != name]
        with refusal("unsupported_budget", name) as caught:
            budget.refuse_others(*others)
        assert caught.value.message == f"{name} does not apply to this model; it knows {', '.join(others)}"
        budget.refuse_others(name)
        budget.refuse_others(*LIMITS)

    def test_nothing_set_is_nothing_to_refuse(self) -> None:
        ImageBudget().refuse_others()
        ImageBudget(detail="high").refuse_others()

    @pytest.mark.parametrize("name", LIMITS)
    def test_one_size_knows_no_limit(self, name: str) -> None:
        budget = ImageBudget(**{name: LIMITS[name]})
        for fixed in (Squash(tile=TILE, resample="bicubic"), rule("squash"), rule("pad")):
            with refusal("unsupported_budget", name):
                fixed.within(budget)

    @pytest.mark.parametrize("detail", ["auto", "low", "high", "original"])
    def test_one_size_has_one_detail(self, detail: Detail) -> None:
        for fixed in (Squash(tile=TILE, resample="bicubic"), rule("squash"), rule("pad")):
            assert fixed.within(ImageBudget(detail=detail)) == (fixed, "auto")

    @pytest.mark.parametrize("tiling", ["dynamic", "dynamic_s2"])
    @pytest.mark.parametrize("name", [name for name in LIMITS if name != "max_tiles"])
    def test_tiles_know_only_their_number(self, tiling: Tiling, name: str) -> None:
        with refusal("unsupported_budget", name) as caught:
            rule(tiling).within(ImageBudget(detail="low", **{name: LIMITS[name]}))
        assert caught.value.message.endswith("it knows max_tiles")

    @pytest.mark.parametrize("tiling", ["dynamic", "dynamic_s2"])
    def test_without_limits_it_is_the_checkpoints_tiling(self, tiling: Tiling) -> None:
        own = rule(tiling)
        assert own.within(ImageBudget()) == (own, "auto")
        assert own.within(ImageBudget(detail="high")) == (own, "high")
        assert own.within(ImageBudget(detail="original")) == (own, "high")

    @MANY
    @given(size=SIZES, tiling=st.sampled_from(["dynamic", "dynamic_s2"]), most=st.integers(1, 40))
    def test_max_tiles_bounds_the_grid(self, size: Size, tiling: Tiling, most: int) -> None:
        own = rule(tiling)
        if tiling == "dynamic_s2" and most < 9:
            with refusal("invalid_budget", "max_tiles"):
                own.within(ImageBudget(max_tiles=most))
            return
        within, applied = own.within(ImageBudget(detail="high", max_tiles=most))
        assert applied == "high"
        layout = within.image(size, PatchGeometry(14, S2[1]), ImageContext())
        assert 1 <= layout.arrangement.area <= most
        assert tuple(layout.arrangement) == closest_by_the_book(size, tile_bounds(own)[0], most, 448)[::-1]

    @pytest.mark.parametrize(("tiling", "most"), [("dynamic_s2", 8), ("dynamic_s2", 1), ("dynamic", MOST_TILES + 1)])
    def test_a_number_of_tiles_that_cannot_be_is_refused(self, tiling: Tiling, most: int) -> None:
        """Too few for the scales; or so many that looking for the best grid would keep the process busy."""
        with refusal("invalid_budget", "max_tiles") as caught:
            rule(tiling).within(ImageBudget(max_tiles=most))
        least = 9 if tiling == "dynamic_s2" else 1
        assert f"max_tiles {most} is not between {least} and {MOST_TILES}" in caught.value.message

    @MANY
    @given(size=SIZES, tiling=st.sampled_from(["dynamic", "dynamic_s2"]))
    def test_low_is_one_tile_as_in_company(self, size: Size, tiling: Tiling) -> None:
        within, applied = rule(tiling).within(ImageBudget(detail="low", max_tiles=4))
        assert applied == "low"
        alone = within.image(size, PatchGeometry(14, S2[1]), ImageContext())
        assert alone == layout_of(size, (rule(tiling), S2[1]), alone=False)
        assert len(alone.tiles) == 1
