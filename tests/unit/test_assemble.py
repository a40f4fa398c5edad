"""How the projector's rows of several tiles become an image's: every assembly against a loop over single rows."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from siglane.config.projector import vila_projector
from siglane.projector.assemble import assemble, projector_input
from siglane.tiling.rule import ImageContext, PatchGeometry
from siglane.tiling.vila import VilaTiling
from siglane.types import (
    AnyRes,
    Assembly,
    Box,
    Grid,
    ImageLayout,
    ImagePlaceholder,
    MergedScales,
    Newline,
    NewlinePlace,
    Pooling,
    Resize,
    Size,
    Tile,
)

WIDTH = 5
NEWLINE = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0])
PROPERTY = settings(max_examples=60, deadline=None, database=None)


def rows_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def layout_of(
    projected: tuple[Grid, ...], arrangement: Grid, assembly: Assembly | None, image_tokens: int, scales: int = 0
) -> ImageLayout:
    """projected: of the tiles that the projector sees, behind `scales` that it does not."""
    tile = Tile((Resize(Size(8, 8), "bicubic"),), Box(0, 0, 8, 8), Grid(2, 2))
    pieces, tiles = (ImagePlaceholder(image_tokens),), (tile,) * (scales + len(projected))
    return ImageLayout(Size(8, 8), tiles, pieces, arrangement, assembly, projected=projected)


def bilinear(picture: list[list[torch.Tensor]], target: Grid) -> list[list[torch.Tensor]]:
    """Half-pixel centres, borders repeated, no antialiasing: one output row at a time."""
    height, width = len(picture), len(picture[0])

    def neighbours(place: int, before: int, after: int) -> tuple[int, int, float]:
        centre = max(0.0, (place + 0.5) * before / after - 0.5)
        first = min(int(centre), before - 1)
        return first, min(first + 1, before - 1), centre - first

    found = []
    for y in range(target.h):
        top, bottom, down = neighbours(y, height, target.h)
        line = []
        for x in range(target.w):
            left, right, across = neighbours(x, width, target.w)
            above = picture[top][left] * (1 - across) + picture[top][right] * across
            below = picture[bottom][left] * (1 - across) + picture[bottom][right] * across
            line.append(above * (1 - down) + below * down)
        found.append(line)
    return found


def map_by_hand(rows: torch.Tensor, arrangement: Grid, grid: Grid) -> list[list[torch.Tensor]]:
    """The row of tile (r, c) at (y, x) stands at (r * h + y, c * w + x)."""
    whole: list[list[torch.Tensor]] = [[rows[0]] * (arrangement.w * grid.w) for _ in range(arrangement.h * grid.h)]
    places = product(range(arrangement.h), range(arrangement.w), range(grid.h), range(grid.w))
    for number, (r, c, y, x) in enumerate(places):
        whole[r * grid.h + y][c * grid.w + x] = rows[number]
    return whole


class TestAnyRes:
    @PROPERTY
    @given(
        arrangement=st.builds(Grid, st.integers(1, 3), st.integers(1, 4)),
        grid=st.builds(Grid, st.integers(1, 4), st.integers(1, 4)),
        margins=st.tuples(*[st.integers(0, 1)] * 4),
        resized=st.none() | st.builds(Grid, st.integers(1, 7), st.integers(1, 7)),
        base=st.builds(Grid, st.integers(1, 4), st.integers(1, 4)),
    )
    def test_is_the_loop(
        self, arrangement: Grid, grid: Grid, margins: tuple[int, ...], resized: Grid | None, base: Grid
    ) -> None:
        height, width = arrangement.h * grid.h, arrangement.w * grid.w
        left, top = min(margins[0], width - 1), min(margins[1], height - 1)
        crop = Box(left, top, max(left + 1, width - margins[2]), max(top + 1, height - margins[3]))
        rows = rows_of(base.area + arrangement.area * grid.area)

        picture = map_by_hand(rows[base.area :], arrangement, grid)
        picture = [line[crop.left : crop.right] for line in picture[crop.top : crop.bottom]]
        if resized is not None:
            picture = bilinear(picture, resized)
        expected = list(rows[: base.area])
        for line in picture:
            expected += [*line, NEWLINE]

        layout = layout_of((base, *(grid,) * arrangement.area), arrangement, AnyRes(crop, resized), len(expected))
        found = assemble(rows, layout, NEWLINE)
        torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)

    def test_nothing_is_interpolated_that_need_not_be(self) -> None:
        """Uncropped and unresized, the rows are the projector's own bits, and the newlines the parameter's."""
        rows = rows_of(4 + 6 * 4)
        layout = layout_of((Grid(2, 2),) * 7, Grid(2, 3), AnyRes(Box(0, 0, 6, 4), None), 4 + 4 * 7)
        found = assemble(rows, layout, NEWLINE)
        assert torch.equal(found[:4], rows[:4])
        lines = found[4:].unflatten(0, (4, 7))
        assert (lines[:, -1] == NEWLINE).all()
        assert torch.equal(lines[0, :2], rows[4:6])
        assert torch.equal(lines[0, 2:4], rows[8:10])
        assert torch.equal(lines[1, :2], rows[6:8])
        assert torch.equal(lines[2, :2], rows[16:18])

    def test_keeps_the_dtype_of_the_rows(self) -> None:
        layout = layout_of((Grid(2, 2),) * 2, Grid(1, 1), AnyRes(Box(0, 0, 2, 2), Grid(1, 1)), 4 + 2)
        assert assemble(rows_of(8).bfloat16(), layout, NEWLINE).dtype == torch.bfloat16


class TestNewline:
    @PROPERTY
    @given(
        tiles=st.integers(1, 5),
        grid=st.builds(Grid, st.integers(1, 6), st.integers(1, 6)),
        pooled=st.none() | st.builds(Grid, st.integers(1, 6), st.integers(1, 6)),
    )
    def test_is_the_loop(self, tiles: int, grid: Grid, pooled: Grid | None) -> None:
        rows = rows_of(tiles * grid.area)
        expected: list[torch.Tensor] = []
        for number in range(tiles):
            own = rows[number * grid.area : (number + 1) * grid.area]
            picture = [[own[y * grid.w + x] for x in range(grid.w)] for y in range(grid.h)]
            expected += [row for line in (bilinear(picture, pooled) if pooled else picture) for row in line]
        expected.append(NEWLINE)
        layout = layout_of((grid,) * tiles, Grid(1, 1), Newline(pooled), len(expected))
        found = assemble(rows, layout, NEWLINE)
        torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("place", ["end", "tile", "row", "nowhere"])
    @pytest.mark.parametrize("pooling", ["average", "max"])
    def test_of_two_by_two_neighbours(self, place: NewlinePlace, pooling: Pooling) -> None:
        """Of odd maps the last row and column are left out."""
        rows, grid, pooled = rows_of(2 * 20), Grid(5, 4), Grid(2, 2)
        expected: list[torch.Tensor] = []
        for own in rows.split(grid.area):
            for y, x in product(range(pooled.h), range(pooled.w)):
                four = torch.stack([own[(2 * y + dy) * grid.w + 2 * x + dx] for dy in (0, 1) for dx in (0, 1)])
                expected.append(four.mean(0) if pooling == "average" else four.amax(0))
                expected += [NEWLINE] if place == "row" and x == pooled.w - 1 else []
            expected += [NEWLINE] if place == "tile" else []
        expected += [NEWLINE] if place == "end" else []
        layout = layout_of((grid,) * 2, Grid(1, 1), Newline(pooled, pooling, place), len(expected))
        torch.testing.assert_close(assemble(rows, layout, NEWLINE), torch.stack(expected), atol=1e-6, rtol=0)

    def test_without_pooling_tiles_may_differ(self) -> None:
        rows = rows_of(6 + 4)
        layout = layout_of((Grid(2, 3), Grid(2, 2)), Grid(1, 1), Newline(None), 11)
        assert torch.equal(assemble(rows, layout, NEWLINE), torch.cat((rows, NEWLINE[None])))


class TestMergedScales:
    def test_the_rows_of_the_last_scale_form_one_map(self) -> None:
        rows, grid, arrangement = rows_of(12 * 4), Grid(2, 2), Grid(3, 4)
        layout = layout_of((grid,) * 12, arrangement, MergedScales((1, 2), 3), 48, scales=5)
        expected = [row for line in map_by_hand(rows, arrangement, grid) for row in line]
        assert torch.equal(assemble(rows, layout, None), torch.stack(expected))

    @pytest.mark.parametrize("scales", [(8,), (8, 16), (8, 16, 24), (8, 24)])
    @pytest.mark.parametrize("size", [Size(40, 30), Size(10, 70), Size(9, 9)])
    def test_features_of_all_scales_lie_above_each_other(self, scales: tuple[int, ...], size: Size) -> None:
        """Each map patch beside the mean of what every other scale shows there, by hand; one scale is a map too."""
        rule = VilaTiling(
            tile=Size(8, 8), resample="bicubic", tiling="dynamic_s2", min_tiles=1, max_tiles=12,
            s2_scales=scales, fill=(0, 0, 0),
        )  # fmt: skip
        channels = 3
        geometry = PatchGeometry(4, vila_projector("identity", input_size=channels * len(scales), output_size=WIDTH))
        layout = rule.image(size, geometry, ImageContext())
        last, grid = layout.arrangement, Grid(2, 2)
        features = torch.randn(layout.patches, channels, generator=torch.Generator().manual_seed(0))
        arrangements = [*(Grid(scale // 8, scale // 8) for scale in scales[:-1]), last]
        maps = []
        start = 0
        for arrangement in arrangements:
            stop = start + arrangement.area * grid.area
            maps.append(map_by_hand(features[start:stop], arrangement, grid))
            start = stop
        height, width = last.h * grid.h, last.w * grid.w
        expected = []
        for y, x in product(range(height), range(width)):
            expected.append(torch.cat([mean_below(one, y, x, height, width) for one in maps]))
        read = projector_input(features, layout)
        assert layout.projector_grids == layout.projected == (grid,) * last.area  # the identity projector
        found = assemble(read, layout, None)
        torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)

    def test_a_single_tile_repeats_its_channels(self) -> None:
        features = rows_of(4)
        layout = layout_of((Grid(2, 2),), Grid(1, 1), MergedScales((), 3), 4)
        assert torch.equal(projector_input(features, layout), torch.cat((features, features, features), dim=1))

    def test_tiles_of_one_scale_that_are_no_map_stay_in_order(self) -> None:
        """The frames of a video."""
        rows = rows_of(12)
        layout = layout_of((Grid(2, 2),) * 3, Grid(1, 1), MergedScales((), 3), 12)
        assert torch.equal(assemble(rows, layout, None), rows)


def mean_below(picture: list[list[torch.Tensor]], y: int, x: int, height: int, width: int) -> torch.Tensor:
    """Area interpolation: the mean of all entries that the cell (y, x) of a height x width map touches."""
    before_h, before_w = len(picture), len(picture[0])
    lines = range(y * before_h // height, -(-(y + 1) * before_h // height))
    columns = range(x * before_w // width, -(-(x + 1) * before_w // width))
    return torch.stack([picture[line][column] for line in lines for column in columns]).mean(0)


ASSEMBLIES: list[Assembly | None] = [
    None,
    Newline(None),
    Newline(Grid(1, 1)),
    AnyRes(Box(0, 0, 2, 2), None),
    MergedScales((), 2),
]


class TestCount:
    @pytest.mark.parametrize("assembly", ASSEMBLIES)
    @pytest.mark.parametrize("off", [-1, 1])
    def test_another_number_of_rows_than_the_layout_says_is_an_error(self, assembly: Assembly | None, off: int) -> None:
        tokens = {Newline(None): 9, Newline(Grid(1, 1)): 3, AnyRes(Box(0, 0, 2, 2), None): 4 + 2 * 3}
        count = 8 if assembly is None else tokens.get(assembly, 8)
        layout = layout_of((Grid(2, 2),) * 2, Grid(1, 1), assembly, count)
        assert assemble(rows_of(8), layout, NEWLINE).shape == (count, WIDTH)
        wrong = replace(layout, pieces=(ImagePlaceholder(count + off),))
        with pytest.raises(RuntimeError, match=f"gave {count} rows, the layout says {count + off}"):
            assemble(rows_of(8), wrong, NEWLINE)

    @pytest.mark.parametrize("assembly", [Newline(None), AnyRes(Box(0, 0, 2, 2), None)])
    def test_a_model_without_the_newline_cannot_end_rows(self, assembly: Assembly) -> None:
        with pytest.raises(ValueError, match="the model has none"):
            assemble(rows_of(8), layout_of((Grid(2, 2),) * 2, Grid(1, 1), assembly, 9), None)
