"""nanoVLM's tiles: the vectors of formats.md 7.2, the order of pieces, budgets, and what no size may break."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siglane.config.projector import pixel_shuffle_projector
from siglane.errors import ConfigError, UserError
from siglane.tiling.nanovlm import WholeTiles
from siglane.tiling.rule import CHECKPOINT_LIMITS, ImageBudget, ImageContext, PatchGeometry
from siglane.types import Box, Grid, ImagePlaceholder, Marker, Resize, Size, Token, VideoSize

GEOMETRY = PatchGeometry(16, pixel_shuffle_projector(4, input_size=768, output_size=960))  # 512 pixels: 64 rows
TOKENS = tuple(tuple(f"<row_{row}_col_{column}>" for column in range(1, 9)) for row in range(1, 9))
NEWEST = WholeTiles(side=512, longest=4, enlarge=True, global_token="<|global_image|>", tile_tokens=TOKENS)
PLAIN = replace(NEWEST, enlarge=False)
GRID = replace(PLAIN, longest=2, global_token="")
SIZES = st.builds(Size, st.integers(1, 5000), st.integers(1, 5000))
RULES = st.sampled_from([NEWEST, PLAIN, GRID, replace(PLAIN, side=224, longest=1), replace(PLAIN, side=96, longest=3)])


def layout(rule: WholeTiles, width: int, height: int, place: ImageContext = ImageContext()) -> Any:  # noqa: B008 (frozen)
    return rule.image(Size(width, height), GEOMETRY, place)


@pytest.mark.parametrize(
    ("rule", "width", "height", "expected"),
    [
        (NEWEST, 640, 480, (3, 4)),
        (NEWEST, 480, 640, (4, 3)),
        (PLAIN, 1024, 1024, (2, 2)),
        (PLAIN, 640, 480, (2, 2)),
        (PLAIN, 512, 512, (1, 1)),
        (PLAIN, 513, 512, (2, 2)),
        (PLAIN, 513, 256, (1, 2)),
        (PLAIN, 514, 257, (1, 2)),
        (PLAIN, 512, 1, (1, 1)),
        (PLAIN, 17, 4000, (4, 1)),
        (PLAIN, 4000, 17, (1, 4)),
        (PLAIN, 4000, 3000, (3, 4)),
        (NEWEST, 1, 1, (4, 4)),
        (PLAIN, 1, 1, (1, 1)),
        (GRID, 4000, 4000, (2, 2)),
        (PLAIN, 364, 273, (1, 1)),
        # the reference's rounding, exactly they would have 3 rows; a side of more tiles than `longest` is left out
        (NEWEST, 364, 273, (4, 4)),
        (PLAIN, 1265, 1265, (4, 3)),
        (replace(PLAIN, longest=3), 1265, 1265, (3, 3)),
    ],
)
def test_rows_and_columns(rule: WholeTiles, width: int, height: int, expected: tuple[int, int]) -> None:
    found = layout(rule, width, height)
    assert found.arrangement == expected
    whole = bool(rule.global_token) and expected != (1, 1)
    assert len(found.tiles) == math.prod(expected) + whole
    assert found.image_tokens == found.rows == 64 * len(found.tiles)


def test_the_whole_picture_comes_first() -> None:
    found = layout(NEWEST, 640, 480)
    canvas = Resize(Size(2048, 1536), "bicubic")
    whole, first, second, *_, last = found.tiles
    assert whole.steps == (canvas, Resize(Size(512, 512), "bilinear", in_float=True))
    assert whole.box == first.box == Box(0, 0, 512, 512)
    assert second.box == Box(512, 0, 1024, 512)
    assert last.box == Box(1536, 1024, 2048, 1536)
    assert {tile.steps for tile in found.tiles[1:]} == {(canvas,)}
    names = ["<|global_image|>", *(f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3, 4))]
    assert found.pieces == tuple(piece for name in names for piece in (Token(name), ImagePlaceholder(64)))


def test_a_single_tile_is_the_whole_picture() -> None:
    assert layout(PLAIN, 300, 200).pieces == (Token("<|global_image|>"), ImagePlaceholder(64))
    assert layout(PLAIN, 300, 200).tiles[0].steps == (Resize(Size(512, 512), "bicubic"),)


def test_without_the_whole_picture_a_single_tile_has_its_own_token() -> None:
    assert layout(GRID, 300, 200).pieces == (Token("<row_1_col_1>"), ImagePlaceholder(64))
    names = ["<row_1_col_1>", "<row_1_col_2>"]
    assert layout(GRID, 1024, 512).pieces == tuple(
        piece for name in names for piece in (Token(name), ImagePlaceholder(64))
    )


def test_one_of_several_is_announced() -> None:
    for rule in (NEWEST, GRID):
        found = layout(rule, 300, 200, ImageContext(2, 3))
        assert found.pieces[0] == Marker("<image: 2>", isolated=False)
        assert found.pieces[1:] == layout(rule, 300, 200).pieces


def test_tiles_without_tokens() -> None:
    assert layout(replace(GRID, tile_tokens=()), 1024, 512).pieces == (ImagePlaceholder(64), ImagePlaceholder(64))


@given(SIZES, RULES)
def test_a_picture_is_never_more_than_its_tokens(size: Size, rule: WholeTiles) -> None:
    found = rule.arrangement(size)
    assert 1 <= min(found) <= max(found) <= rule.longest
    if size.width != size.height:
        assert found.w == found.h or (found.w > found.h) == (size.width > size.height)
    if rule.enlarge:
        assert max(found) == rule.longest


@given(SIZES, RULES, st.integers(1, 20))
def test_max_tiles_is_kept_and_only_ever_shortens(size: Size, rule: WholeTiles, most: int) -> None:
    within = rule.within(ImageBudget(max_tiles=most)).rule
    assert isinstance(within, WholeTiles)
    found, before = within.arrangement(size), rule.arrangement(size)
    assert found.area <= most
    if before.area <= most:
        assert found == before


def test_low_is_one_tile() -> None:
    rule, applied = NEWEST.within(ImageBudget(detail="low"))
    assert applied == "low"
    found = rule.image(Size(640, 480), GEOMETRY, ImageContext())
    assert (found.arrangement, found.pieces) == (Grid(1, 1), (Token("<|global_image|>"), ImagePlaceholder(64)))


def test_other_details_are_the_checkpoints() -> None:
    assert NEWEST.within(CHECKPOINT_LIMITS) == (NEWEST, "auto")
    assert NEWEST.within(ImageBudget(detail="high")) == (NEWEST, "high")
    assert NEWEST.within(ImageBudget(detail="original")) == (NEWEST, "high")


def test_a_budget_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match="max_pixels does not apply to this model; it knows max_tiles"):
        NEWEST.within(ImageBudget(max_pixels=1000))


def test_videos_are_refused() -> None:
    with pytest.raises(UserError, match="not videos"):
        NEWEST.video(VideoSize(Size(64, 64), 2), GEOMETRY)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"longest": 9}, "vlm_extra_tokens has 8x8 of them"), ({"longest": 33}, "33x33 tiles; at most 1024")],
)
def test_pictures_without_tokens_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(NEWEST, **change)
