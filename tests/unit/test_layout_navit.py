"""Native resolution: sizes as the reference rounds them, bounds as a caller sets them, frames as tiles."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from siglane.config.projector import vocabulary_projector
from siglane.errors import ConfigError, UserError
from siglane.tiling.navit import NativeResolution, smart_resize
from siglane.tiling.rule import ImageBudget, ImageContext, PatchGeometry
from siglane.types import Box, Grid, ImageLayout, ImagePlaceholder, Indicator, Resize, Size, VideoSize

MANY = settings(max_examples=300, deadline=None, database=None)

FACTOR = 32
LEAST, MOST = 448**2, 1792**2
RULE = NativeResolution(factor=FACTOR, min_pixels=LEAST, max_pixels=MOST, resample="bilinear")
GEOMETRY = PatchGeometry(16, vocabulary_projector(2, 1028, 4, head="head", table="vte", input_size=8, output_size=8))


def resized(width: int, height: int, least: int = LEAST, most: int | None = MOST) -> Size:
    return smart_resize(Size(width, height), factor=FACTOR, min_pixels=least, max_pixels=most)


def layout_of(width: int, height: int, rule: NativeResolution = RULE) -> ImageLayout:
    return rule.image(Size(width, height), GEOMETRY, ImageContext())


def pixels(layout: ImageLayout) -> int:
    (tile,) = layout.tiles
    return tile.canvas.width * tile.canvas.height


@pytest.mark.parametrize(
    ("height", "width", "to", "grid", "atoms", "to_small"),
    [  # formats.md 3.2; the last column with max_pixels 1344 x 1792
        (480, 640, (480, 640), (30, 40), 300, (480, 640)),
        (224, 224, (448, 448), (28, 28), 196, (448, 448)),
        (1080, 1920, (1088, 1920), (68, 120), 2040, (1088, 1920)),
        (4000, 3000, (2048, 1536), (128, 96), 3072, (1792, 1344)),
        (100, 2000, (128, 2016), (8, 126), 252, (128, 2016)),
        (16, 3000, (64, 6144), (4, 384), 384, (64, 6144)),
        (1, 300, (32, 9600), (2, 600), 300, (32, 9600)),
        (48, 48, (448, 448), (28, 28), 196, (448, 448)),
        (1, 1, (448, 448), (28, 28), 196, (448, 448)),
        (4000, 17, (7520, 32), (470, 2), 235, (7520, 32)),
    ],
)
def test_vectors(
    height: int, width: int, to: tuple[int, int], grid: tuple[int, int], atoms: int, to_small: tuple[int, int]
) -> None:
    layout = layout_of(width, height)
    (tile,) = layout.tiles
    assert tile.steps == (Resize(Size(to[1], to[0]), "bilinear"),)
    assert tile.box == Box(0, 0, to[1], to[0])
    assert tile.grid == Grid(*grid)
    assert layout.image_tokens == atoms
    assert layout.rows == atoms + 2
    assert layout.pieces == (Indicator(0), ImagePlaceholder(atoms), Indicator(1))
    assert resized(width, height, most=1344 * 1792) == Size(to_small[1], to_small[0])


@pytest.mark.parametrize(
    ("side", "rounded"), [(48, 64), (80, 64), (81, 96), (112, 128), (144, 128), (79, 64), (47, 32), (32, 32)]
)
def test_halves_round_to_the_even_multiple(side: int, rounded: int) -> None:
    """1.5 and 3.5 round up, 2.5 and 4.5 down."""
    assert resized(side, 320, least=1, most=None) == Size(rounded, 320)


def test_a_strip_of_more_than_200_to_1_loses_its_ends() -> None:
    """8 x 201 blocks of pixels; a side below the factor is enlarged first, and then nothing is cut."""
    assert resized(40 * 201, 40, least=1, most=None) == Size(40 * 200, 32)
    assert resized(40, 40 * 201, least=1, most=None) == Size(32, 40 * 200)
    assert resized(31 * 400, 31, least=1, most=None) == Size(32 * 400, 32)


@MANY
@given(st.integers(1, 8000), st.integers(1, 8000), st.integers(1024, 4_000_000), st.integers(1024, 4_000_000))
@example(6000, 1, 1024, 1024)
@example(1, 6000, 4096, 4096)
@example(33, 33, 2000, 3000)
def test_within_the_bounds_for_every_size(width: int, height: int, one: int, other: int) -> None:
    least, most = sorted((one, other))
    found = resized(width, height, least, most)
    assert found.width % FACTOR == found.height % FACTOR == 0
    assert FACTOR**2 <= found.width * found.height <= most


@MANY
@given(st.integers(1, 8000), st.integers(1, 8000))
def test_the_reference_exactly_with_its_own_bounds(width: int, height: int) -> None:
    """Its formula written again; every size up to 8000 pixels keeps within its bounds there."""
    assert resized(width, height) == reference(width, height)


def reference(width: int, height: int) -> Size:
    if min(width, height) < FACTOR:
        long = round(FACTOR / min(width, height) * max(width, height))
        wide, high = (long, FACTOR) if height < width else (FACTOR, long)
    elif max(width, height) / min(width, height) > 200:
        wide, high = min(width, 200 * height), min(height, 200 * width)
    else:
        wide, high = width, height
    sides = [round(side / FACTOR) for side in (wide, high)]
    if sides[0] * sides[1] * FACTOR**2 > MOST:
        sides = [math.floor(side / math.sqrt(wide * high / MOST) / FACTOR) for side in (wide, high)]
        if 0 in sides:  # the reference fails
            return resized(width, height)
    elif sides[0] * sides[1] * FACTOR**2 < LEAST:
        sides = [math.ceil(side * math.sqrt(LEAST / (wide * high)) / FACTOR) for side in (wide, high)]
    return Size(sides[0] * FACTOR, sides[1] * FACTOR)


def test_a_strip_that_the_reference_would_make_0_pixels_high_is_one_block_high() -> None:
    assert resized(65536, 1) == Size(MOST // 32, 32)
    assert resized(1, 65536) == Size(32, MOST // 32)


class TestClips:
    def test_every_frame_is_a_tile_at_the_first_ones_size(self) -> None:
        layout = RULE.video(VideoSize(Size(640, 480), 3), GEOMETRY)
        assert [tile.frame for tile in layout.tiles] == [0, 1, 2]
        assert {tile.grid for tile in layout.tiles} == {Grid(30, 40)}
        assert layout.pieces == (Indicator(2), ImagePlaceholder(900), Indicator(3))
        assert (layout.frames, layout.source, layout.rows) == (3, Size(640, 480), 902)

    def test_bounds_are_per_frame(self) -> None:
        budget = ImageBudget(max_pixels=896**2)
        layout = RULE.within(budget).rule.video(VideoSize(Size(1920, 1080), 8), GEOMETRY)
        (size,) = {tile.canvas for tile in layout.tiles}
        assert 0.9 * 896**2 < size.width * size.height <= 896**2


class TestBudgets:
    @pytest.mark.parametrize("detail", ["auto", "high"])
    def test_the_checkpoints_own(self, detail: str) -> None:
        assert RULE.within(ImageBudget(detail=detail)) == (RULE, detail)  # type: ignore[arg-type]

    def test_low_is_the_least(self) -> None:
        rule, detail = RULE.within(ImageBudget(detail="low"))
        assert detail == "low"
        assert rule == replace(RULE, max_pixels=LEAST)
        assert rule.image(Size(4000, 3000), GEOMETRY, ImageContext()).image_tokens == 12 * 16

    def test_original_only_rounds(self) -> None:
        rule, detail = RULE.within(ImageBudget(detail="original"))
        assert detail == "original"
        assert rule.image(Size(6000, 4000), GEOMETRY, ImageContext()).tiles[0].canvas == Size(6016, 4000)
        assert rule.image(Size(70, 30), GEOMETRY, ImageContext()).tiles[0].canvas == Size(64, 32)

    def test_an_original_that_is_limited_is_high(self) -> None:
        rule, detail = RULE.within(ImageBudget(detail="original", max_pixels=10**6))
        assert detail == "high"
        assert pixels(rule.image(Size(6000, 4000), GEOMETRY, ImageContext())) <= 10**6

    @pytest.mark.parametrize("most", [1024, 5000, 448**2 - 1, 600_000, 9_000_000])
    @pytest.mark.parametrize("size", [(3000, 2000), (40, 30), (1, 2999), (5000, 100)])
    def test_max_pixels_holds_for_every_picture(self, most: int, size: tuple[int, int]) -> None:
        """Also below the checkpoint's least, which it then lowers."""
        rule, detail = RULE.within(ImageBudget(max_pixels=most))
        assert detail == "auto"
        assert pixels(rule.image(Size(*size), GEOMETRY, ImageContext())) <= most

    def test_min_pixels_enlarges(self) -> None:
        rule, _ = RULE.within(ImageBudget(min_pixels=10**6))
        assert pixels(rule.image(Size(100, 100), GEOMETRY, ImageContext())) >= 10**6

    def test_low_takes_the_callers_least(self) -> None:
        assert RULE.within(ImageBudget(detail="low", min_pixels=10**5)).rule == replace(
            RULE, min_pixels=10**5, max_pixels=10**5
        )
        assert RULE.within(ImageBudget(detail="low", max_pixels=10**5)).rule == replace(
            RULE, min_pixels=10**5, max_pixels=10**5
        )

    @pytest.mark.parametrize(
        ("budget", "param", "words"),
        [
            (ImageBudget(max_pixels=1023), "max_pixels", "less than the 1024 of one block"),
            (ImageBudget(min_pixels=MOST + 1), "min_pixels", f"more than max_pixels {MOST}"),
            (
                ImageBudget(min_pixels=5000, max_pixels=4000),
                "min_pixels",
                "min_pixels 5000 is more than max_pixels 4000",
            ),
            (ImageBudget(max_tiles=4), "max_tiles", "it knows max_pixels, min_pixels"),
            (ImageBudget(max_num_patches=4), "max_num_patches", "it knows max_pixels, min_pixels"),
            (ImageBudget(grid_pinpoints=((32, 32),)), "grid_pinpoints", "it knows max_pixels, min_pixels"),
        ],
    )
    def test_what_leaves_no_picture_or_does_not_apply_is_refused(
        self, budget: ImageBudget, param: str, words: str
    ) -> None:
        with pytest.raises(UserError, match=words) as caught:
            RULE.within(budget)
        assert caught.value.param == param

    @pytest.mark.parametrize(("least", "most"), [(1000, 999), (1, 1023)])
    def test_a_checkpoints_own_contradiction_is_a_configuration_error(self, least: int, most: int) -> None:
        with pytest.raises(ConfigError, match=f"max_pixels {most} is less"):
            replace(RULE, min_pixels=least, max_pixels=most)
