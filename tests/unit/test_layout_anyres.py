"""anyres: integers for integers what transformers computes, and one row for every row the projector gives."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import unpad_image
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from siglane.config.projector import llava_projector
from siglane.errors import ConfigError, UserError
from siglane.image.tile import render_tiles
from siglane.projector.assemble import assemble
from siglane.tiling.anyres import AnyResTiling, best_pinpoint, fitted, shrunk, unpadded
from siglane.tiling.rule import ImageBudget, ImageContext, PatchGeometry
from siglane.types import (
    AnyRes,
    Box,
    Detail,
    Grid,
    ImageLayout,
    Newline,
    NewlinePlace,
    Pad,
    Pooling,
    Resize,
    Size,
    VideoSize,
)

MANY = settings(max_examples=300, deadline=None, database=None)
SOME = settings(max_examples=60, deadline=None, database=None)

SIZES = st.builds(Size, st.integers(1, 6000), st.integers(1, 6000))
PINPOINTS = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))
PROJECTOR = llava_projector(input_size=4, output_size=4)
GEOMETRY, GEOMETRY_16 = PatchGeometry(14, PROJECTOR), PatchGeometry(16, PROJECTOR)

RULE = AnyResTiling(
    tile=Size(384, 384), resample="bicubic", frame_resample="bilinear", fill=(127, 127, 127), pinpoints=PINPOINTS,
    max_maps=9,
)  # fmt: skip
# two rows along a tile: a flat picture may have none in the map, and maps become small
SMALL = replace(RULE, tile=Size(28, 28), pinpoints=tuple((28 * i, 28 * j) for i in range(1, 7) for j in range(1, 7)))


def layout_of(size: Size, rule: AnyResTiling = RULE, *, images: int = 1) -> ImageLayout:
    return rule.image(size, GEOMETRY, ImageContext(0, images))


class TheirCount(LlavaOnevisionProcessor):
    """transformers' own counting, which reads nothing but these."""

    def __init__(self, rule: AnyResTiling, patch: int = 14) -> None:
        pinpoints: Any = [list(pinpoint) for pinpoint in rule.pinpoints]
        self.image_processor = SimpleNamespace(image_grid_pinpoints=pinpoints)
        self.num_image_tokens = (rule.tile.height // patch) ** 2
        self.vision_aspect_ratio = f"anyres_max_{rule.max_maps}"

    def of(self, size: Size, rule: AnyResTiling) -> int:
        return int(self._get_number_of_features(size.height, size.width, *rule.tile))


@pytest.mark.parametrize(
    ("height", "width", "grid", "rows", "tokens"),
    [
        (384, 384, (1, 1), (27, 27), 1485),
        (480, 640, (2, 2), (40, 54), 2929),
        (1080, 1920, (3, 5), (60, 108), 7269),
        (3000, 4000, (5, 6), (70, 93), 7309),
        (100, 2000, (1, 6), (9, 162), 2196),
    ],
)
def test_vectors(height: int, width: int, grid: tuple[int, int], rows: tuple[int, int], tokens: int) -> None:
    """formats.md section 6."""
    layout = layout_of(Size(width, height))
    assert layout.arrangement == grid
    assert isinstance(layout.assembly, AnyRes)
    crop = layout.assembly.crop
    assert (layout.assembly.resized or (crop.bottom - crop.top, crop.right - crop.left)) == rows
    assert layout.image_tokens == layout.rows == tokens == TheirCount(RULE).of(Size(width, height), RULE)


ORIGINAL = replace(RULE, digits=None)
ALL_ROWS = replace(ORIGINAL, max_maps=None)


@pytest.mark.parametrize(
    ("width", "height", "grid", "tokens", "all_rows"),
    [
        (640, 480, (2, 2), 2929, 2929),
        (800, 600, (2, 3), 4725, 4725),
        (1000, 1000, (3, 3), 7371, 7371),
        (1920, 1080, (3, 5), 7269, 10929),
        (2000, 300, (1, 6), 4804, 4804),
        (333, 1024, (3, 1), 2997, 2997),
        (1872, 832, (3, 5), 7248, None),  # transformers has 7263
        (1323, 98, (1, 4), 1492, None),  # and here 1710
    ],
)
def test_vectors_of_the_original_code(
    width: int, height: int, grid: tuple[int, int], tokens: int, all_rows: int | None
) -> None:
    """formats.md section 6.2."""
    layout = layout_of(Size(width, height), ORIGINAL)
    assert (layout.arrangement, layout.image_tokens) == (grid, tokens)
    if all_rows is None:
        assert layout_of(Size(width, height)).image_tokens == {1872: 7263, 1323: 1710}[width]
    else:
        assert layout_of(Size(width, height), ALL_ROWS).image_tokens == all_rows


def test_pictures_that_are_always_padded_are_one_tile() -> None:
    padded = replace(ORIGINAL, always_padded=True)
    alone, one_of_two = (layout_of(Size(640, 480), padded, images=images) for images in (1, 2))
    assert alone == one_of_two == layout_of(Size(640, 480), images=2)
    assert alone.image_tokens == 730
    assert padded.within(ImageBudget(detail="high")) == (padded, "auto")


@pytest.mark.parametrize(
    ("pooling", "counts"),
    [
        ("bilinear", {"end": 1569, "row": 1680, "tile": 1576, "nowhere": 1568}),
        ("average", {"end": 1353, "row": 1456, "tile": 1360, "nowhere": 1352}),
        ("max", {"end": 1353, "row": 1456, "tile": 1360, "nowhere": 1352}),
    ],
)
def test_eight_frames(pooling: Pooling, counts: dict[NewlinePlace, int]) -> None:
    """formats.md section 6.2."""
    rules = {place: replace(ORIGINAL, pooling=pooling, newlines=place) for place in counts}
    video = VideoSize(Size(640, 360), 8)
    layouts = {place: rule.video(video, GEOMETRY) for place, rule in rules.items()}
    assert {place: layout.image_tokens for place, layout in layouts.items()} == counts
    rows = torch.rand(8 * 729, 3)
    assert {place: len(assemble(rows, layout, torch.ones(3))) for place, layout in layouts.items()} == counts


@pytest.mark.parametrize(
    ("width", "height", "tokens", "of_patch_14"),
    [
        (640, 480, 2340, 2929),
        (800, 600, 3696, 4725),
        (1000, 1000, 5832, 7371),
        (1920, 1080, 5760, 7269),
        (333, 1024, 2376, 2997),
        (2000, 300, 3766, 4804),
    ],
)
def test_vectors_of_patches_of_16(width: int, height: int, tokens: int, of_patch_14: int) -> None:
    """formats.md section 6.1."""
    size = Size(width, height)
    assert RULE.image(size, GEOMETRY_16, ImageContext()).image_tokens == tokens == TheirCount(RULE, 16).of(size, RULE)
    assert layout_of(size).image_tokens == of_patch_14


def test_ten_thousand_sizes_are_counted_as_transformers_counts_them() -> None:
    numbers = np.random.default_rng(0).integers(1, 5000, (10_000, 2)).tolist()
    for patch, geometry in ((14, GEOMETRY), (16, GEOMETRY_16)):
        theirs = TheirCount(RULE, patch)
        sizes = [Size(*pair) for pair in numbers[patch == 16 :: 2]]
        assert [RULE.image(size, geometry, ImageContext()).image_tokens for size in sizes] == [
            theirs.of(size, RULE) for size in sizes
        ]


@MANY
@given(SIZES, st.sampled_from([1, 2, 4, 9, 16]))
@example(Size(17, 4000), 9)
@example(Size(4000, 17), 9)
@example(Size(1, 1), 9)
def test_placeholders_are_transformers_number(size: Size, max_maps: int) -> None:
    rule = replace(RULE, max_maps=max_maps)
    assert layout_of(size, rule).image_tokens == TheirCount(rule).of(size, rule)


@MANY
@given(SIZES, st.one_of(st.just(PINPOINTS), st.lists(st.sampled_from(PINPOINTS), min_size=1, max_size=8).map(tuple)))
def test_the_canvas_is_transformers_choice(size: Size, pinpoints: tuple[tuple[int, int], ...]) -> None:
    """In whatever order the list has them."""
    theirs = select_best_resolution((size.height, size.width), [list(pinpoint) for pinpoint in pinpoints])
    assert best_pinpoint(size, pinpoints) == theirs


@pytest.mark.parametrize("pinpoints", [((384, 768), (768, 384)), ((768, 384), (384, 768))])
def test_the_first_of_equal_canvases_wins(pinpoints: tuple[tuple[int, int], ...]) -> None:
    assert best_pinpoint(Size(500, 500), pinpoints) == pinpoints[0]


@MANY
@given(SIZES)
def test_the_map_is_cropped_as_transformers_crops_it(size: Size) -> None:
    height, width = best_pinpoint(size, PINPOINTS)
    whole = torch.empty(1, height // 384 * 27, width // 384 * 27)
    left, top, right, bottom = unpadded(size, Grid(*whole.shape[1:]))
    assert (bottom - top, right - left) == unpad_image(whole, (size.height, size.width)).shape[1:]


def test_a_very_flat_picture_may_have_no_row_of_the_map() -> None:
    layout = layout_of(Size(4000, 40), SMALL)
    assert layout.arrangement == (1, 6)
    assert layout.image_tokens == TheirCount(SMALL).of(Size(4000, 40), SMALL) == 4
    rows = assemble(torch.rand(7 * 4, 3), layout, torch.ones(3))
    assert rows.shape == (4, 3)


@pytest.mark.parametrize(
    ("rows", "most", "expected"),
    [
        (Grid(11, 11), 100, None),  # exactly 1.1 is left alone
        (Grid(12, 11), 100, (10, 9)),
        (Grid(1, 12), 4, (1, 6)),  # the reference asks for no row and fails
        (Grid(0, 12), 4, None),
    ],
)
def test_large_maps_shrink(rows: Grid, most: int, expected: Grid | None) -> None:
    assert shrunk(rows, most) == expected


@SOME
@given(st.builds(Size, st.integers(1, 900), st.integers(1, 900)))
@example(Size(900, 1))
@example(Size(1, 900))
@example(Size(1, 1))
def test_pixels_are_those_of_transformers_processor(size: Size) -> None:
    """Tile by tile before rescaling; the first is the whole picture squashed."""
    rgb = np.random.default_rng(size.width).integers(0, 256, (size.height, size.width, 3), dtype=np.uint8)
    pinpoints = [list(pinpoint) for pinpoint in SMALL.pinpoints]
    theirs = LlavaOnevisionImageProcessorPil(
        size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints, do_rescale=False, do_normalize=False
    )(Image.fromarray(rgb), input_data_format="channels_last")["pixel_values"][0]
    ours = render_tiles([rgb], layout_of(size, SMALL))
    assert len(ours) == len(theirs)
    for mine, tile in zip(ours, theirs, strict=True):
        assert np.array_equal(mine.transpose(2, 0, 1), tile)


class TestTiles:
    def test_the_whole_picture_comes_first_then_rows_of_tiles(self) -> None:
        layout = layout_of(Size(1920, 1080))
        assert layout.tiles[0].steps == (Resize(Size(384, 384), "bicubic"),)
        assert layout.tiles[0].box == (0, 0, 384, 384)
        boxes = [tile.box for tile in layout.tiles[1:]]
        assert len(boxes) == 15
        assert boxes == sorted(boxes, key=lambda box: (box.top, box.left))
        assert boxes[1] == (384, 0, 768, 384)
        assert set(layout.grids) == {Grid(27, 27)}

    def test_the_aspect_ratio_is_kept_and_the_rest_is_black(self) -> None:
        steps = fitted(Size(640, 481), Size(768, 768), "bicubic")
        assert steps == (Resize(Size(768, 578), "bicubic"), Pad(Size(768, 768), 0, 95, (0, 0, 0)))

    def test_sides_are_rounded_up(self) -> None:
        steps = fitted(Size(1000, 3), Size(384, 384), "bicubic")
        assert steps[0] == Resize(Size(384, 2), "bicubic")

    def test_height_and_width_are_not_exchanged(self) -> None:
        wide, tall = layout_of(Size(1000, 300)), layout_of(Size(300, 1000))
        assert wide.arrangement == tall.arrangement[::-1] != tall.arrangement
        assert wide.tiles[-1].canvas.width > wide.tiles[-1].canvas.height


class TestOneTile:
    def test_an_image_among_others_is_padded_with_the_mean_and_ends_with_one_newline(self) -> None:
        layout = layout_of(Size(300, 100), images=2)
        (tile,) = layout.tiles
        assert tile.steps == (Pad(Size(300, 300), 0, 100, (127, 127, 127)), Resize(Size(384, 384), "bicubic"))
        assert layout.assembly == Newline(None)
        assert layout.image_tokens == 729 + 1

    def test_a_square_needs_no_padding(self) -> None:
        assert layout_of(Size(100, 100), images=2).tiles[0].steps == (Resize(Size(384, 384), "bicubic"),)

    @pytest.mark.parametrize("images", [1, 2])
    def test_low(self, images: int) -> None:
        """Alone it is anyres' first tile and a newline; among others nothing changes."""
        low = RULE.within(ImageBudget(detail="low"))
        assert low.detail == "low"
        layout = low.rule.image(Size(1920, 1080), GEOMETRY, ImageContext(0, images))
        assert layout.image_tokens == 730
        whole = layout_of(Size(1920, 1080), images=images)
        assert layout.tiles == whole.tiles[:1]


@pytest.mark.parametrize("frames", [1, 2, 32])
def test_a_clip_is_a_quarter_of_every_frame_and_one_newline(frames: int) -> None:
    layout = RULE.video(VideoSize(Size(640, 360), frames), GEOMETRY)
    assert layout.image_tokens == 196 * frames + 1
    assert layout.assembly == Newline(Grid(14, 14))
    assert [tile.frame for tile in layout.tiles] == list(range(frames))
    assert {tile.steps for tile in layout.tiles} == {(Resize(Size(384, 384), "bilinear"),)}
    assert layout.frames == frames


@SOME
@given(SIZES, st.booleans(), st.integers(1, 3))
def test_every_row_has_its_place(size: Size, small: bool, images: int) -> None:
    """`assemble` counts the rows of a real map against the layout."""
    rule = SMALL if small else RULE
    layout = rule.image(size, GEOMETRY, ImageContext(0, images))
    rows = torch.rand(layout.patches, 2)
    assembled = assemble(rows, layout, torch.full((2,), 7.0))
    assert len(assembled) == layout.image_tokens
    assert torch.equal(assembled[: layout.grids[0].area], rows[: layout.grids[0].area])
    ends = int((assembled == 7.0).all(-1).sum())
    match layout.assembly:
        case AnyRes(crop, resized):
            assert ends == (resized.h if resized else crop.bottom - crop.top)
        case _:
            assert ends == 1
            assert (assembled[-1] == 7.0).all()


class TestBudgets:
    @pytest.mark.parametrize(
        ("detail", "applied"), [("auto", "auto"), ("high", "high"), ("original", "high"), ("low", "low")]
    )
    def test_details(self, detail: Detail, applied: Detail) -> None:
        rule, found = RULE.within(ImageBudget(detail=detail))
        assert found == applied
        assert (rule == RULE) == (detail != "low")

    @given(SIZES, st.integers(1, 40))
    @SOME
    def test_max_tiles(self, size: Size, most: int) -> None:
        layout = RULE.within(ImageBudget(max_tiles=most)).rule.image(size, GEOMETRY, ImageContext())
        assert 1 <= layout.arrangement.area == len(layout.tiles) - 1 <= most

    def test_the_smallest_canvas_always_stays(self) -> None:
        large = replace(RULE, pinpoints=((768, 768), (384, 768), (768, 384)))
        rule = large.within(ImageBudget(max_tiles=1)).rule
        assert rule == replace(large, pinpoints=((384, 768),))

    def test_pinpoints_replace_the_checkpoints(self) -> None:
        rule = RULE.within(ImageBudget(grid_pinpoints=((384, 1152), (768, 384)), max_tiles=2)).rule
        assert rule == replace(RULE, pinpoints=((768, 384),))

    @pytest.mark.parametrize(
        ("pinpoints", "message"),
        [
            (((384, 400),), "384x400 is not a multiple of the tile's 384 pixels"),
            (((192, 384),), "192x384 is not a multiple of the tile's 384 pixels"),
            (((384, 384 * 37),), "384x14208 are 37 tiles, at most 36 are possible"),
        ],
    )
    def test_pinpoints_that_are_no_canvas(self, pinpoints: tuple[tuple[int, int], ...], message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            RULE.within(ImageBudget(grid_pinpoints=pinpoints))
        assert caught.value.code == "invalid_budget"
        assert caught.value.param == "grid_pinpoints"

    @pytest.mark.parametrize("name", ["max_pixels", "min_pixels", "max_num_patches"])
    def test_limits_of_other_families(self, name: str) -> None:
        limits: dict[str, Any] = {name: 1000}
        with pytest.raises(UserError, match=f"{name} does not apply to this model"):
            RULE.within(ImageBudget(**limits))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile": Size(384, 392)}, "square tiles, got 384x392"),
        ({"pinpoints": ()}, "give at least one"),
        ({"pinpoints": ((384, 390),)}, "384x390 is not a multiple"),
        ({"pinpoints": ((384, 384 * 1025),)}, "1025 tiles, at most 1024"),
    ],
)
def test_a_rule_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(RULE, **changes)


@SOME
@given(SIZES)
def test_padding_and_cropping_agree(size: Size) -> None:
    """The crop of the map covers the pictures' pixels on the canvas to within a row at each end."""
    layout = layout_of(size)
    resized, padded = layout.tiles[-1].steps
    assert isinstance(padded, Pad)
    assert isinstance(layout.assembly, AnyRes)
    row = 384 / 27
    left, top, right, bottom = layout.assembly.crop
    assert isinstance(layout.assembly.crop, Box)
    for start, stop, before, length in (
        (left, right, padded.left, resized.size.width),
        (top, bottom, padded.top, resized.size.height),
    ):
        assert math.isclose(start * row, before, abs_tol=row)
        assert math.isclose(stop * row, before + length, abs_tol=row)
