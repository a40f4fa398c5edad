"""What stands around an image in the prompt: rows, learned rows, added tokens and text, and the spans they leave."""

from __future__ import annotations

from functools import cache

import pytest
from checkpoints import MEDIA, build_tokenizer, plain_backend

from siglane.errors import ConfigError
from siglane.families.family import PromptRules
from siglane.families.prompt.builder import PromptBuilder
from siglane.types import (
    Box,
    Grid,
    ImageLayout,
    ImagePart,
    ImagePlaceholder,
    ImageSpan,
    Indicator,
    Marker,
    Message,
    Piece,
    Prompt,
    Resize,
    Size,
    Tile,
    Token,
)

ROW_1, ROW_2 = "<row_1_col_1>", "<row_1_col_2>"
IMAGE = 9999  # lies outside every table: it is never looked up
TEMPLATE = "{% for message in messages %}{{ '<|im_start|>' ~ message['content'] ~ '<|im_end|>' }}{% endfor %}"
LINE_FEED, TEXT_FEED = Marker("\n", isolated=True), Marker("\n", isolated=False)


@cache
def builder() -> PromptBuilder:
    tokenizer = build_tokenizer((*MEDIA, ROW_1, ROW_2))
    rules = PromptRules(default_template=TEMPLATE, strip_messages=False)
    return PromptBuilder(tokenizer, rules, image_token="<image>", image_token_id=IMAGE)


@cache
def special(text: str) -> int:
    found = build_tokenizer((*MEDIA, ROW_1, ROW_2)).get_added_vocab()[text]
    assert isinstance(found, int)
    return found


def plain(text: str) -> list[int]:
    ids: list[int] = plain_backend().encode(text, add_special_tokens=False).ids
    return ids


def image(*pieces: Piece) -> ImageLayout:
    tile = Tile((Resize(Size(2, 1), "bicubic"),), Box(0, 0, 2, 1), Grid(1, 2))
    return ImageLayout(Size(2, 1), (tile,), pieces, Grid(1, 1), projected=())


def prompt(*parts: str | ImageLayout) -> Prompt:
    """One user turn."""
    images = [part for part in parts if not isinstance(part, str)]
    numbers = iter(range(len(images)))
    message = Message("user", tuple(part if isinstance(part, str) else ImagePart(next(numbers)) for part in parts))
    return builder().chat([message], images, {})


def turn(*ids: int) -> tuple[int, ...]:
    return (special("<|im_start|>"), *ids, special("<|im_end|>"))


class TestSpans:
    def test_learned_rows_and_features_are_one_span(self) -> None:
        """Ovis: start, atoms, end."""
        found = prompt("a ", image(Indicator(0), ImagePlaceholder(3), Indicator(1)), " b")
        before = plain("a ")
        assert found.token_ids == turn(*before, *[IMAGE] * 5, *plain(" b"))
        assert found.spans == (ImageSpan(1 + len(before), 6 + len(before), 0),)

    def test_rows_that_follow_each_other_are_one_span(self) -> None:
        found = prompt(
            image(
                ImagePlaceholder(2),
                ImagePlaceholder(3),
                Marker("", isolated=False),
                Indicator(0),
                Marker("", isolated=True),
            )
        )
        assert found.token_ids == turn(*[IMAGE] * 6)
        assert found.spans == (ImageSpan(1, 7, 0),)

    def test_rows_of_different_images_are_not(self) -> None:
        one, other = image(Indicator(0), ImagePlaceholder(2)), image(ImagePlaceholder(1), Indicator(1))
        found = prompt(one, other, one)
        assert found.token_ids == turn(*[IMAGE] * 8)
        assert found.spans == (ImageSpan(1, 4, 0), ImageSpan(4, 6, 1), ImageSpan(6, 9, 2))
        assert found.layouts == (one, other, one)
        assert found.order == (0, 1, 2)

    def test_anything_between_begins_another_span(self) -> None:
        """VILA: the newline behind every tile is an id of its own."""
        found = prompt(image(ImagePlaceholder(2), LINE_FEED, ImagePlaceholder(2), LINE_FEED), "x")
        feed = plain("\n")
        assert found.token_ids == turn(IMAGE, IMAGE, *feed, IMAGE, IMAGE, *feed, *plain("x"))
        assert found.spans == (ImageSpan(1, 3, 0), ImageSpan(3 + len(feed), 5 + len(feed), 0))


class TestTokens:
    def test_an_added_token_is_its_id(self) -> None:
        """nanoVLM: every tile behind the token that names its place."""
        found = prompt("one", image(Token(ROW_1), ImagePlaceholder(2), Token(ROW_2), ImagePlaceholder(1)), "two")
        ids = [*plain("one"), special(ROW_1), IMAGE, IMAGE, special(ROW_2), IMAGE, *plain("two")]
        assert found.token_ids == turn(*ids)
        start = 1 + len(plain("one"))
        assert found.spans == (ImageSpan(start + 1, start + 3, 0), ImageSpan(start + 4, start + 5, 0))

    def test_a_user_who_writes_one_writes_letters(self) -> None:
        found = prompt(ROW_1, image(Token(ROW_1), ImagePlaceholder(1)), ROW_1)
        assert found.token_ids == turn(*plain(ROW_1), special(ROW_1), IMAGE, *plain(ROW_1))
        assert len(plain(ROW_1)) > 1

    def test_one_the_tokenizer_does_not_have_is_refused(self) -> None:
        with pytest.raises(ConfigError) as caught:
            prompt(image(Token("<row_9_col_9>"), ImagePlaceholder(1)))
        message = "the tokenizer has no token '<row_9_col_9>', which this model puts beside images"
        assert str(caught.value) == message


class TestText:
    def test_a_marker_joins_the_text_beside_it_unless_it_is_isolated(self) -> None:
        """Two newlines are one token of this vocabulary: formats.md trap 12."""
        assert len(plain("\n\n")) == 1
        joined = prompt(image(ImagePlaceholder(1), TEXT_FEED), "\nx")
        assert joined.token_ids == turn(IMAGE, *plain("\n\nx"))
        apart = prompt(image(ImagePlaceholder(1), LINE_FEED), "\nx")
        assert apart.token_ids == turn(IMAGE, *plain("\n"), *plain("\nx"))
        assert joined.token_ids != apart.token_ids

    def test_text_joins_across_images_without_rows_between(self) -> None:
        found = prompt("\n", image(TEXT_FEED, ImagePlaceholder(1), TEXT_FEED), image(TEXT_FEED, ImagePlaceholder(1)))
        assert found.token_ids == turn(*plain("\n\n"), IMAGE, *plain("\n\n"), IMAGE)

    def test_markers_are_text_even_where_they_spell_a_token(self) -> None:
        found = prompt(image(Marker(ROW_1, isolated=False), Marker("<image>", isolated=True), ImagePlaceholder(1)))
        assert found.token_ids == turn(*plain(ROW_1), *plain("<image>"), IMAGE)


def test_every_image_has_its_rows() -> None:
    pieces = (Token(ROW_1), Indicator(0), ImagePlaceholder(4), LINE_FEED, ImagePlaceholder(2), TEXT_FEED, Indicator(1))
    found = prompt("a", image(*pieces), image(*pieces), "b")
    assert sum(token == IMAGE for token in found.token_ids) == 2 * 8
    for number, one in enumerate(found.layouts):
        spans = [span for span in found.spans if span.image == number]
        assert [span.stop - span.start for span in spans] == [5, 2, 1]
        assert one.rows == 8
        assert one.image_tokens == 6
