"""A prompt is written from layouts alone, before any pixel is decoded, and its images find their places afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_nvila_checkpoint
from nanovlm_checkpoint import write_nanovlm_checkpoint

from siglane.families.processor import Processor, load_processor
from siglane.types import (
    DecodedImage,
    DecodedVideo,
    ImagePart,
    ImagePatches,
    Medium,
    Message,
    Request,
    SamplingParams,
    Size,
    VideoSize,
)
from siglane.weights.hub import open_checkpoint

IMAGES = (Size(130, 70), Size(20, 30), Size(60, 140))
VIDEO_AND_IMAGES = (VideoSize(Size(130, 70), 3), *IMAGES[1:])
MESSAGE = Message("user", ("Compare", ImagePart(0), "with", ImagePart(2), "and", ImagePart(1)))

# images, then videos, then the text of a turn, whatever order the messages have
MOVING = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content if part.type == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message.content if part.type == 'video' %}{{ '<vila/video>' }}{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
)


def nanovlm(folder: Path) -> Processor:
    """Tokens that name their places stand between the tiles."""
    write_nanovlm_checkpoint(folder)
    return load_processor(open_checkpoint(folder))


def nvila(folder: Path) -> Processor:
    """A line feed stands behind every tile and frame."""
    write_nvila_checkpoint(folder, chat_template=MOVING)
    return load_processor(open_checkpoint(folder))


def decoded(medium: Medium, number: int) -> DecodedImage | DecodedVideo:
    """No two numbers look alike."""
    size = medium if isinstance(medium, Size) else medium.size
    image = DecodedImage.from_rgb(np.full((size.height, size.width, 3), 40 * number, np.uint8))
    return image if isinstance(medium, Size) else DecodedVideo.of([image] * medium.frames)


def patches_of(processor: Processor, media: Sequence[Medium]) -> list[ImagePatches]:
    images = [decoded(medium, number) for number, medium in enumerate(media)]
    layouts = processor.layouts([image.size for image in images])
    return [processor.patches(image, layout) for image, layout in zip(images, layouts, strict=True)]


@pytest.mark.parametrize(
    ("load", "media", "order"), [(nanovlm, IMAGES, (0, 2, 1)), (nvila, VIDEO_AND_IMAGES, (2, 1, 0))]
)
def test_what_the_sizes_say_is_the_prompt_of_the_patches(
    load: Callable[[Path], Processor], media: Sequence[Medium], order: tuple[int, ...], tmp_path: Path
) -> None:
    processor = load(tmp_path)
    prompt = processor.prompt([MESSAGE], processor.layouts(media))
    patches = patches_of(processor, media)
    again = processor.prompt([MESSAGE], [one.layout for one in patches])
    assert (prompt.token_ids, prompt.spans, prompt.layouts) == (again.token_ids, again.spans, again.layouts)
    assert prompt.order == again.order == order

    images = prompt.in_order(patches)
    assert images == tuple(patches[number] for number in order)
    request = Request("a", prompt, SamplingParams(), 1, images=images)
    places = [[span for span in prompt.spans if span.image == number] for number in range(len(images))]
    assert any(len(spans) > 1 for spans in places), "no image has text between its tiles"
    for image, spans in zip(images, places, strict=True):
        assert sum(span.stop - span.start for span in spans) == image.layout.rows
        assert {request.cache_ids()[span.start] for span in spans} == {-1 - int.from_bytes(image.digest, "little")}

    with pytest.raises(ValueError, match="does not have the layout that the prompt was written for"):
        Request("a", prompt, SamplingParams(), 1, images=tuple(patches))
