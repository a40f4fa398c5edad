"""The shared nouns refuse contradictions when they are built."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from siglane.types import (
    Box,
    DecodedImage,
    Grid,
    ImageLayout,
    ImagePatches,
    ImagePlaceholder,
    ImageSpan,
    ImageTokens,
    Marker,
    Prompt,
    Request,
    Resize,
    SamplingParams,
    Size,
    Tile,
    digest_of,
)

IMAGE_ID = 99


def image(name: str, rows: int = 3) -> ImagePatches:
    """Two patches that become `rows` rows, in two pieces."""
    tile = Tile((Resize(Size(2, 1), "bicubic"),), Box(0, 0, 2, 1), Grid(1, 2))
    pieces = (ImagePlaceholder(rows - 1), Marker("\n", isolated=True), ImagePlaceholder(1))
    layout = ImageLayout(Size(2, 1), (tile,), pieces, Grid(1, 1), projected=())
    return ImagePatches(torch.zeros(2, 3), layout, digest_of(name.encode()))


def prompt(*images: ImagePatches, text: int = 7) -> Prompt:
    """`text`, two rows, a newline, one row; for each image."""
    one = (text, IMAGE_ID, IMAGE_ID, 5, IMAGE_ID)
    spans = [
        span
        for number in range(len(images))
        for span in (
            ImageSpan(5 * number + 1, 5 * number + 3, number),
            ImageSpan(5 * number + 4, 5 * number + 5, number),
        )
    ]
    return Prompt(one * len(images), tuple(spans), tuple(one.layout for one in images), tuple(range(len(images))))


def request(*images: ImagePatches) -> Request:
    return Request("a", prompt(*images), SamplingParams(), 1, images=images)


class TestPrompt:
    def test_spans_hold_exactly_the_rows_of_the_layouts(self) -> None:
        assert prompt(image("a"), image("b")).image_tokens == 6
        assert Prompt((1, 2, 3)).image_tokens == 0

    @pytest.mark.parametrize(
        ("spans", "complaint"),
        [
            (((0, 2, 0),), r"spans hold \[2\] rows, the layouts say \[3\]"),
            (((0, 4, 0),), r"spans hold \[4\] rows, the layouts say \[3\]"),
            ((), r"spans hold \[0\] rows, the layouts say \[3\]"),
            (((0, 2, 0), (1, 2, 0)), "overlaps its predecessor"),
            (((3, 4, 0), (0, 2, 0)), "overlaps its predecessor"),
            (((2, 2, 0), (0, 3, 0)), "overlaps its predecessor"),
            (((3, 6, 0),), "leaves the prompt of 5 ids"),
            (((-1, 2, 0),), "leaves the prompt of 5 ids"),
            (((0, 3, 1),), "belongs to no image of 1"),
            (((0, 3, -1),), "belongs to no image of 1"),
        ],
    )
    def test_spans_that_contradict_the_prompt_are_refused(
        self, spans: tuple[tuple[int, int, int], ...], complaint: str
    ) -> None:
        with pytest.raises(ValueError, match=complaint):
            Prompt((IMAGE_ID,) * 5, tuple(ImageSpan(*span) for span in spans), (image("a").layout,), (0,))

    @pytest.mark.parametrize("order", [(), (0,), (0, 0), (1, 2), (0, 1, 2), (-1, 0)])
    def test_the_order_names_each_image_once(self, order: tuple[int, ...]) -> None:
        known = prompt(image("a"), image("b"))
        with pytest.raises(ValueError, match="does not name each of 2 images once"):
            Prompt(known.token_ids, known.spans, known.layouts, order)

    def test_what_belongs_to_the_images_is_put_in_the_prompts_order(self) -> None:
        known = prompt(image("a"), image("b"), image("c"))
        moved = Prompt(known.token_ids, known.spans, known.layouts, (2, 0, 1))
        assert moved.in_order(["first", "second", "third"]) == ("third", "first", "second")
        assert Prompt((1,)).in_order([]) == ()
        for wrong in (["first", "second"], ["first", "second", "third", "fourth"]):
            with pytest.raises(ValueError, match=f"the prompt has 3 images, {len(wrong)} are given"):
                moved.in_order(wrong)


class TestRequest:
    def test_its_images_are_the_prompts(self) -> None:
        one, other = image("a"), image("b", rows=4)
        spans = (ImageSpan(0, 3, 0), ImageSpan(3, 7, 1))
        asked = Prompt((IMAGE_ID,) * 7, spans, (one.layout, other.layout), (0, 1))
        assert Request("a", asked, SamplingParams(), 1, images=(one, other)).images == (one, other)
        for wrong in ((), (one,), (one, other, other)):
            with pytest.raises(ValueError, match=f"the prompt has 2 images, {len(wrong)} are given"):
                Request("a", asked, SamplingParams(), 1, images=wrong)
        with pytest.raises(ValueError, match="image 0 does not have the layout that the prompt was written for"):
            Request("a", asked, SamplingParams(), 1, images=(other, one))
        with pytest.raises(ValueError, match="image 1 does not have the layout"):
            Request("a", asked, SamplingParams(), 1, images=(one, one))
        with pytest.raises(ValueError, match="the prompt has 0 images, 1 are given"):
            Request("a", Prompt((1, 2)), SamplingParams(), 1, images=(one,))

    def test_cache_ids_are_equal_for_equal_images_only(self) -> None:
        same, other = request(image("a"), image("b")), request(image("a"), image("c"))
        assert same.cache_ids() == request(image("a"), image("b")).cache_ids()
        assert same.cache_ids()[:5] == other.cache_ids()[:5]
        assert same.cache_ids() != other.cache_ids()

    def test_cache_ids_keep_the_text_and_cannot_be_taken_for_it(self) -> None:
        ids = request(image("a")).cache_ids()
        assert (ids[0], ids[3]) == (7, 5)
        assert ids[1] == ids[2] == ids[4] < 0


@pytest.mark.parametrize(
    "rgb", [np.zeros((2, 2), np.uint8), np.zeros((2, 2, 4), np.uint8), np.zeros((2, 2, 3), np.float32)]
)
def test_a_picture_is_8_bit_rgb(rgb: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"rgb must be u8 \[H, W, 3\]"):
        DecodedImage(rgb, digest_of(b""))


def test_a_digest_covers_pixels_and_shape() -> None:
    flat = np.arange(12, dtype=np.uint8)
    wide, tall = (DecodedImage.from_rgb(flat.reshape(shape)) for shape in ((1, 4, 3), (4, 1, 3)))
    assert wide.size == Size(width=4, height=1)
    assert wide.digest != tall.digest
    assert wide.digest == DecodedImage.from_rgb(flat[::-1][::-1].reshape(1, 4, 3)).digest
    assert wide.digest != DecodedImage.from_rgb((flat + 1).reshape(1, 4, 3)).digest


def test_no_two_lists_of_parts_share_a_digest() -> None:
    assert len({digest_of(*parts) for parts in ((), (b"",), (b"ab",), (b"a", b"b"), (b"", b"ab"), (b"ab", b""))}) == 6


def test_shapes_are_checked() -> None:
    layout = image("a").layout
    with pytest.raises(ValueError, match=r"pixels must be \[2, patch_dim\]"):
        ImagePatches(torch.zeros(3, 3), layout, digest_of(b""))
    with pytest.raises(ValueError, match="a digest has 32 bytes, got 3"):
        ImagePatches(torch.zeros(2, 3), layout, b"abc")
    with pytest.raises(ValueError, match="lengths add up to 5"):
        ImageTokens(torch.zeros(4, 2), (2, 3))
    assert [len(rows) for rows in ImageTokens(torch.zeros(5, 2), (2, 3)).split()] == [2, 3]
