"""Idefics3's tiles and frames: sizes and grids of transformers' own code, what stands around tiles, budgets, and which
position each patch of a partial picture takes."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import build_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.idefics3.image_processing_pil_idefics3 import (
    Idefics3ImageProcessorPil,
    get_resize_output_image_size,
)
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

from siglane.config.projector import pixel_shuffle_projector
from siglane.config.video import VideoRule
from siglane.errors import ConfigError, UserError
from siglane.families.prompt.writer import PlainTokenizer, PromptWriter
from siglane.tiling.idefics3 import LongestEdge
from siglane.tiling.rule import CHECKPOINT_LIMITS, ImageBudget, ImageContext, PatchGeometry
from siglane.tiling.spoken import in_words, minutes
from siglane.types import Box, Grid, ImageLayout, ImagePlaceholder, Marker, Resize, Size, Token, VideoSize
from siglane.vision.position import bucketised

RULE = LongestEdge(
    longest=2048, tile=Size(512, 512), splits=True, resample="lanczos", frame_longest=512,
    around="<fake_token_around_image>", whole="<global-img>",
)  # fmt: skip
# longest, tile, patch, pixel shuffle: of 256M and 500M, of 2.2B, of Idefics3-8B
SHAPES = {"512": (2048, 512, 16, 4), "384": (1536, 384, 14, 3), "364": (1456, 364, 14, 2)}
VIDEO = VideoRule("<video>", 64, 64, spread="paced", with_images=False, timed=True)


def shaped(longest: int, side: int, patch: int, factor: int) -> tuple[LongestEdge, PatchGeometry]:
    geometry = PatchGeometry(patch, pixel_shuffle_projector(factor, input_size=8, output_size=8))
    return replace(RULE, longest=longest, tile=Size(side, side)), geometry


GEOMETRY = shaped(*SHAPES["512"])[1]


def layout(size: tuple[int, int], rule: LongestEdge = RULE, geometry: PatchGeometry = GEOMETRY) -> ImageLayout:
    return rule.image(Size(*size), geometry, ImageContext())


@pytest.mark.parametrize(
    ("size", "first", "grid", "tokens"),
    [
        ((640, 480), (2048, 1536), (3, 4), (832, 1053, 2197)),
        ((100, 80), (2048, 1638), (4, 4), (1088, 1377, 2873)),
        ((1000, 1000), (2048, 2048), (4, 4), (1088, 1377, 2873)),
        ((2000, 300), (2048, 308), (1, 4), (320, 405, 845)),
        ((90, 700), (264, 2048), (4, 1), (320, 405, 845)),
        ((333, 1024), (666, 2048), (4, 2), (576, 729, 1521)),
    ],
)
def test_the_vectors_of_transformers(
    size: tuple[int, int], first: tuple[int, int], grid: tuple[int, int], tokens: tuple[int, ...]
) -> None:
    assert layout(size).tiles[0].steps[0] == Resize(Size(*first), "lanczos")
    for shape, expected in zip(SHAPES.values(), tokens, strict=True):
        found = layout(size, *shaped(*shape))
        assert (found.arrangement, found.image_tokens, len(found.tiles)) == (grid, expected, grid[0] * grid[1] + 1)


class Sizes(Idefics3ImageProcessorPil):
    """transformers' own, of pictures that have a size and no memory."""

    def resize(self, image: Any, size: Any, resample: Any = None, **kwargs: Any) -> Any:
        edge = size.longest_edge
        shape = get_resize_output_image_size(image, edge) if edge else (size.height, size.width)
        return np.broadcast_to(np.uint8(0), (3, *shape))

    def tiles(self, size: Size, longest: int, side: int) -> tuple[Any, Any, int, int, int]:
        """Sizes after both resizes, number of tiles, rows and columns."""
        edge = SimpleNamespace(longest_edge=longest)
        first = self.resize(np.broadcast_to(np.uint8(0), (3, size.height, size.width)), edge)
        second = self.resize_for_vision_encoder(first, side)
        found, rows, columns = self.split_images(second, {"longest_edge": side})
        return first.shape[1:], second.shape[1:], len(found), rows, columns


def test_tiles_and_tokens_of_ten_thousand_sizes_are_transformers() -> None:
    theirs, chance = Sizes(), random.Random(0)
    shapes = [*SHAPES.values(), (1000, 96, 8, 2), (300, 512, 16, 4), (333, 64, 8, 1)]
    for number in range(10_000):
        shape = shapes[number % len(shapes)]
        size = Size(*(round(2 ** chance.uniform(0, 13)) for _ in range(2)))
        rule, geometry = shaped(*shape)
        found = layout(size, rule, geometry)
        first, second, tiles, rows, columns = theirs.tiles(size, *shape[:2])
        assert [step.size for step in found.tiles[0].steps] == [Size(*first[::-1]), Size(*second[::-1])], size
        assert (len(found.tiles), found.arrangement) == (tiles, (max(1, rows), max(1, columns))), size
        assert found.image_tokens == tiles * (shape[1] // shape[2] // shape[3]) ** 2


def test_the_whole_picture_comes_last_and_of_the_canvas() -> None:
    found = layout((640, 480))
    canvas = (Resize(Size(2048, 1536), "lanczos"), Resize(Size(2048, 1536), "lanczos"))
    *tiles, whole = found.tiles
    assert {tile.steps for tile in tiles} == {canvas}
    assert whole.steps == (*canvas, Resize(Size(512, 512), "lanczos"))
    assert (tiles[0].box, tiles[-1].box, whole.box) == (
        Box(0, 0, 512, 512), Box(1536, 1024, 2048, 1536), Box(0, 0, 512, 512),
    )  # fmt: skip


def test_what_stands_around_tiles() -> None:
    fake, rows = Token("<fake_token_around_image>", or_text=True), ImagePlaceholder(64)
    end = [fake, Token("<global-img>", or_text=True), rows, fake]
    assert list(layout((640, 480), replace(RULE, longest=512)).pieces) == end
    expected: list[Any] = []
    for row in (1, 2):
        for column in (1, 2, 3, 4):
            expected += [fake, Token(f"<row_{row}_col_{column}>", or_text=True), rows]
        expected.append(Marker("\n", isolated=False))
    assert list(layout((2048, 700)).pieces) == [*expected, Marker("\n", isolated=False), *end]


@pytest.mark.parametrize(("size", "length"), [((100, 80), 1127), ((2000, 300), 332)])
def test_two_line_feeds_are_one_token(size: tuple[int, int], length: int) -> None:
    """As in every tokenizer of the family: 1,127 ids for 4x4 tiles of 64 rows, not 1,128."""
    places = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    tokenizer = build_tokenizer(("<fake_token_around_image>", "<global-img>", *places))
    writer = PromptWriter(PlainTokenizer(tokenizer), tokenizer.get_added_vocab(), 9999)
    writer.image(layout(size).pieces)
    assert len(writer.finish()) == length
    assert len(tokenizer("\n\n").input_ids) == 1


def test_pictures_that_are_not_cut_are_resized_twice() -> None:
    found = layout((640, 480), replace(RULE, splits=False))
    assert found.arrangement == (1, 1)
    assert found.tiles[0].steps == (Resize(Size(2048, 1536), "lanczos"), Resize(Size(512, 512), "lanczos"))


@given(st.builds(Size, st.integers(1, 9000), st.integers(1, 9000)), st.integers(1, 20), st.sampled_from(list(SHAPES)))
def test_max_tiles_is_kept_and_only_ever_shortens(size: Size, most: int, shape: str) -> None:
    rule, geometry = shaped(*SHAPES[shape])
    within = rule.within(ImageBudget(max_tiles=most)).rule
    found, before = (one.image(size, geometry, ImageContext()) for one in (within, rule))
    assert found.arrangement.area <= most
    if before.arrangement.area <= most:
        assert found == before


def test_details_and_budgets() -> None:
    rule, applied = RULE.within(ImageBudget(detail="low", max_tiles=9))
    assert applied == "low"
    low = rule.image(Size(640, 480), GEOMETRY, ImageContext())
    assert [step.size for step in low.tiles[0].steps] == [(512, 384), (512, 512)]
    assert RULE.within(CHECKPOINT_LIMITS) == (RULE, "auto")
    assert RULE.within(ImageBudget(detail="high")) == (RULE, "high")
    with pytest.raises(UserError, match="max_pixels does not apply to this model; it knows max_tiles"):
        RULE.within(ImageBudget(max_pixels=1000))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"longest": 4097}, "pictures of 4097 pixels; at most 4096"),
        ({"frame_longest": 5000}, "pictures of 5000 pixels"),
        ({"tile": Size(32, 32)}, "64x64 tiles; at most 1024"),
    ],
)
def test_what_no_model_has_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(RULE, **change)


class TestVideos:
    def test_what_the_model_is_told(self) -> None:
        found = RULE.video(VideoSize(Size(640, 360), 3, (0.0, 59.99, 61.2), 3725.9), GEOMETRY)
        fake, whole, rows = Token("<fake_token_around_image>", or_text=True), Token("<global-img>", or_text=True), 64
        block = [fake, whole, ImagePlaceholder(rows), fake]
        texts = [
            "You are provided the following series of three frames from a 1:02:05 [H:MM:SS] video.\n",
            *(f"\nFrame from {time}:" for time in ("00:00", "00:59", "01:01")),
        ]
        said = [Marker(text, isolated=False) for text in texts]
        expected = [said[0], said[1], *block, said[2], *block, said[3], *block, Marker("\n\n", isolated=False)]
        assert list(found.pieces) == expected
        assert found.frames == len(found.tiles) == 3
        assert [tile.frame for tile in found.tiles] == [0, 1, 2]
        assert [step.size for step in found.tiles[0].steps] == [(512, 288), (512, 512)]

    def test_times_that_nobody_knows(self) -> None:
        found = RULE.video(VideoSize(Size(64, 48), 30), GEOMETRY)
        texts = [piece.text for piece in found.pieces if isinstance(piece, Marker)]
        assert "thirty frames from a 0:00:01 [H:MM:SS]" in texts[0]
        assert texts[-2] == "\nFrame from 00:01:"

    def test_frames_of_each_second(self) -> None:
        assert VIDEO.indices(300, 64, 30.0) == (0, 33, 66, 99, 132, 166, 199, 232, 265, 299)
        assert VIDEO.indices(3, 64, 30.0) == (0,)
        found = VIDEO.indices(3600, 64, 30.0)
        assert (len(found), found[:3], found[-2:]) == (64, (30, 86, 142), (3513, 3570))

    def test_frames_are_transformers(self) -> None:
        chance = random.Random(1)
        for _ in range(500):
            total, rate = round(2 ** chance.uniform(0, 14)), chance.choice([1.0, 8.0, 23.976, 29.97, 30.0, 60.0])
            fps, most = chance.choice([0.5, 1.0, 2.0, 3.7]), chance.randint(1, 70)
            facts: Any = {"fps": rate, "duration": total / rate}
            metadata = type("Metadata", (dict,), {"fps": rate, "total_num_frames": total})(facts)
            theirs = SmolVLMVideoProcessor.sample_frames(SimpleNamespace(), metadata, most, fps)  # type: ignore[arg-type]
            assert replace(VIDEO, fps=fps).indices(total, most, rate) == tuple(theirs.tolist()), (
                total,
                rate,
                fps,
                most,
            )

    def test_frames_that_are_given_are_all_shown(self) -> None:
        assert VIDEO.indices(5, 5) == (0, 1, 2, 3, 4)
        assert VIDEO.indices(100, 4) == (0, 33, 66, 99)

    def test_a_pace_of_nothing_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="0 frames of a video's second"):
            replace(VIDEO, fps=0.0)


def test_numbers_are_said_as_num2words_says_them() -> None:
    said = {
        0: "zero", 1: "one", 10: "ten", 13: "thirteen", 20: "twenty", 21: "twenty-one", 64: "sixty-four",
        99: "ninety-nine", 100: "one hundred", 101: "one hundred and one", 999: "nine hundred and ninety-nine",
        1000: "one thousand", 1001: "one thousand and one", 1100: "one thousand, one hundred",
        12345: "twelve thousand, three hundred and forty-five", 100_064: "one hundred thousand and sixty-four",
    }  # fmt: skip
    assert {number: in_words(number) for number in said} == said
    assert [minutes(seconds) for seconds in (0, 59.99, 60, 3725.9)] == ["00:00", "00:59", "01:00", "62:05"]


class TestPositions:
    """Computed by transformers' `Idefics3VisionEmbeddings` in float32."""

    @pytest.mark.parametrize("side", [14, 16, 24, 26, 27, 28, 32])
    def test_a_full_picture_has_every_position(self, side: int) -> None:
        grid = Grid(side, side)
        assert bucketised(grid, grid).tolist() == list(range(side * side))

    def test_a_smaller_picture_is_stretched_over_the_table(self) -> None:
        columns = [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 16, 17, 18, 20, 21, 22, 24, 25, 26, 28, 29, 30]
        found = bucketised(Grid(16, 24), Grid(32, 32)).unflatten(0, (16, 24))
        assert found[0].tolist() == columns
        assert (found[:, 0] // 32).tolist() == list(range(0, 32, 2))
        found = bucketised(Grid(20, 9), Grid(27, 27)).unflatten(0, (20, 9))
        rows = [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 16, 17, 18, 20, 21, 22, 24, 25]
        assert (found[:, 0] // 27).tolist() == rows
        assert found[0].tolist() == list(range(0, 27, 3))

    def test_rounding_is_kept(self) -> None:
        """Other full sizes do not have their own positions one by one."""
        others = [
            side for side in range(1, 41) if bucketised(Grid(side, side), Grid(side, side)).unique().numel() != side**2
        ]
        assert others == [19, 25, 29, 31, 38, 40]

    @pytest.mark.parametrize("learned", [7, 16, 27, 32])
    def test_no_patch_is_beyond_the_table(self, learned: int) -> None:
        for h, w in ((1, 1), (1, 200), (131, 3), (learned + 1, learned)):
            found = bucketised(Grid(h, w), Grid(learned, learned))
            assert found.shape == (h * w,)
            assert 0 <= int(found.min()) <= int(found.max()) < learned**2
            assert torch.equal(found, found.sort().values) or h > 1
