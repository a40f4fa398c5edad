"""Videos in prompts: the family's placeholder, one kind only where it says so, no text that passes for one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import write_nvila_checkpoint

from siglane.errors import ConfigError, UserError
from siglane.families.processor import Processor, load_processor
from siglane.types import ImageLayout, ImagePart, Message, Prompt, Size, VideoSize
from siglane.weights.hub import open_checkpoint

PICTURE, FRAMES = Size(90, 50), 3
LINE_FEED = 1  # tokens behind each frame

# images first, then videos, then the text: the order of LLaVA-OneVision's template
REORDERING = (
    "{% for message in messages %}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content if part.type == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message.content if part.type == 'video' %}{{ '<vila/video>' }}{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    "{% endif %}{% endfor %}"
)
DEAF = REORDERING.replace("'<vila/video>'", "''")


def load(folder: Path, template: str | None = None) -> Processor:
    write_nvila_checkpoint(folder, chat_template=template)
    return load_processor(open_checkpoint(folder))


def media(processor: Processor, *kinds: str) -> tuple[ImageLayout, ...]:
    """A still picture for every "image", a clip for every "video"."""
    return tuple(
        layout
        for kind in kinds
        for layout in processor.layouts([PICTURE if kind == "image" else VideoSize(PICTURE, FRAMES)])
    )


def ask(processor: Processor, parts: tuple[str | ImagePart, ...], *kinds: str) -> Prompt:
    return processor.prompt([Message("user", parts)], media(processor, *kinds))


@pytest.mark.parametrize("template", [None, REORDERING])
def test_a_video_has_as_many_placeholders_as_frames_were_decoded(tmp_path: Path, template: str | None) -> None:
    processor = load(tmp_path, template)
    prompt = ask(processor, (ImagePart(0), "What?"), "video")
    (layout,) = processor.layouts([VideoSize(PICTURE, FRAMES)])
    placeholders = prompt.token_ids.count(processor.config.image_token_id)
    assert placeholders == layout.rows == sum(stop - start for start, stop, _ in prompt.spans)
    assert len(prompt.spans) == FRAMES
    assert [after.start - before.stop for before, after in zip(prompt.spans, prompt.spans[1:], strict=False)] == [
        LINE_FEED
    ] * (FRAMES - 1)


def test_a_template_may_put_images_before_videos(tmp_path: Path) -> None:
    processor = load(tmp_path, REORDERING)
    given = media(processor, "video", "image", "image", "video")
    parts = (ImagePart(0), "a", ImagePart(1), "b", ImagePart(2), ImagePart(3))
    prompt = processor.prompt([Message("user", parts)], given)
    assert prompt.order == (1, 2, 0, 3)
    assert prompt.layouts == (given[1], given[2], given[0], given[3])
    starts = {image: start for start, _, image in reversed(prompt.spans)}
    assert sorted(starts, key=lambda image: starts[image]) == [0, 1, 2, 3]


def test_a_template_that_loses_a_video_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wrote 0 video placeholders for 1 videos") as caught:
        ask(load(tmp_path, DEAF), (ImagePart(0), "What?"), "video")
    assert caught.value.code == "chat_template_failed"


@pytest.mark.parametrize("template", [None, REORDERING])
def test_a_users_text_is_never_a_video(tmp_path: Path, template: str | None) -> None:
    processor = load(tmp_path, template)
    prompt = ask(processor, (ImagePart(0), "<vila/video> <image> <vi", "la/video>"), "video")
    (layout,) = processor.layouts([VideoSize(PICTURE, FRAMES)])
    assert prompt.token_ids.count(processor.config.image_token_id) == layout.rows
    special = processor.tokenizer.get_added_vocab()
    assert special["<vila/video>"] not in prompt.token_ids


def test_a_model_that_reads_one_kind_says_so(tmp_path: Path) -> None:
    whole = load(tmp_path)
    assert whole.facts.video is not None
    images = replace(whole.facts, video=replace(whole.facts.video, with_images=False))
    config = replace(whole.config, images=images)
    processor = load_processor(open_checkpoint(tmp_path), config)
    assert ask(processor, (ImagePart(0), ImagePart(1)), "image", "image").image_tokens > 0
    assert ask(processor, (ImagePart(0), ImagePart(1)), "video", "video").image_tokens > 0
    with pytest.raises(UserError, match="either images or videos") as caught:
        ask(processor, (ImagePart(0), ImagePart(1)), "image", "video")
    assert (caught.value.code, caught.value.param) == ("mixed_media", "messages")
    assert ask(whole, (ImagePart(0), ImagePart(1)), "image", "video").image_tokens > 0


def test_a_model_without_videos_says_so(tmp_path: Path) -> None:
    write_nvila_checkpoint(tmp_path, flags={"video_encoder": {"_target_": "llava.model.encoders.TSPVideoEncoder"}})
    processor = load_processor(open_checkpoint(tmp_path))
    assert processor.facts.video is None
    with pytest.raises(UserError, match="images, not videos"):
        ask(processor, (ImagePart(0), "What?"), "video")


def test_the_number_of_frames_is_the_configurations(tmp_path: Path) -> None:
    def video_of(**flags: object) -> tuple[int, int]:
        write_nvila_checkpoint(tmp_path, flags=flags)
        processor = load_processor(open_checkpoint(tmp_path))
        assert processor.facts.video is not None
        return processor.facts.video.frames, processor.facts.video.most_frames

    assert video_of() == (8, 256)
    assert video_of(num_video_frames=16) == (16, 256)
    assert video_of(num_video_frames=500, fps=0.0) == (500, 500)
    assert video_of(video_encoder={"_target_": "llava.model.encoders.BasicVideoEncoder"}) == (8, 256)
    with pytest.raises(ConfigError, match=r"fps 2\.0 is not supported"):
        video_of(fps=2.0)
