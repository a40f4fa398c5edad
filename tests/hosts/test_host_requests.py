"""What both hosts do with a request: the largest picture, pictures that a caller opened, what travels with an image."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_nvila_checkpoint
from idefics3_checkpoint import write_idefics3_checkpoint
from llava_onevision_checkpoint import write_llava_onevision_checkpoint
from nanovlm_checkpoint import write_nanovlm_checkpoint
from ovis2_5_checkpoint import write_ovis2_5_checkpoint
from parity_kit import picture
from PIL import Image

from siglane.config.images import ImageFacts
from siglane.errors import UserError
from siglane.families.processor import Processor, load_processor
from siglane.hosts.asked import Asked, Described
from siglane.hosts.largest import largest
from siglane.hosts.opened import are_frames, opened_item
from siglane.hosts.request import HostRequests
from siglane.hosts.settings import HostConfig
from siglane.hosts.start import check_start
from siglane.media.messages import image_item, video_item
from siglane.tiling.rule import CHECKPOINT_LIMITS, ImageBudget
from siglane.types import Size, VideoSize
from siglane.weights.hub import Checkpoint

WRITERS: dict[str, Callable[[Path], object]] = {
    "vila": write_nvila_checkpoint,
    "nvila": partial(write_nvila_checkpoint, layout="hf", lite=False),
    "llava_onevision": write_llava_onevision_checkpoint,
    "ovis2_5": write_ovis2_5_checkpoint,
    "nanovlm": write_nanovlm_checkpoint,
    "smolvlm2": partial(write_idefics3_checkpoint, kind="smolvlm2"),
}


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Processor]:
    found: dict[str, Processor] = {}

    def get(name: str) -> Processor:
        if name not in found:
            folder = tmp_path_factory.mktemp("models") / name
            WRITERS[name](folder)
            found[name] = load_processor(Checkpoint(folder))
        return found[name]

    return get


class TestTheLargestPicture:
    PIXELS = 1 << 21

    def rows(self, facts: ImageFacts, size: Size, frames: int = 0) -> int:
        (layout,) = facts.layouts([VideoSize(size, frames) if frames else size])
        return layout.rows

    @pytest.mark.parametrize("name", WRITERS)
    def test_no_picture_has_more_rows(self, processors: Any, name: str) -> None:
        facts = processors(name).facts
        size, rows = largest(facts, CHECKPOINT_LIMITS, frames=0, most_pixels=self.PIXELS, most_rows=1 << 20)
        assert self.rows(facts, size) == rows > 0
        assert size.width * size.height <= self.PIXELS
        chance = random.Random(0)
        for _ in range(300):
            width = round(2 ** chance.uniform(0, 12))
            height = min(round(2 ** chance.uniform(0, 12)), self.PIXELS // width)
            assert self.rows(facts, Size(width, height)) <= rows

    @pytest.mark.parametrize("name", ["vila", "llava_onevision", "ovis2_5"])
    def test_no_video_has_more_rows(self, processors: Any, name: str) -> None:
        facts = processors(name).facts
        size, rows = largest(facts, CHECKPOINT_LIMITS, frames=4, most_pixels=self.PIXELS, most_rows=1 << 20)
        assert self.rows(facts, size, frames=4) == rows
        assert all(self.rows(facts, Size(side, side), frames=4) <= rows for side in (1, 28, 60, 100, 448, 1000))

    def test_there_is_room_for_it(self, processors: Any) -> None:
        facts = processors("ovis2_5").facts
        size, rows = largest(facts, CHECKPOINT_LIMITS, frames=0, most_pixels=self.PIXELS, most_rows=50)
        assert 25 < rows == self.rows(facts, size) <= 50

    def test_within_a_budget(self, processors: Any) -> None:
        facts = processors("vila").facts
        limits = ImageBudget(max_tiles=2)
        _, rows = largest(facts, limits, frames=0, most_pixels=self.PIXELS, most_rows=1 << 20)
        assert rows == facts.layouts([Size(200, 100)], [limits])[0].rows


class TestOpenedPictures:
    def test_pictures_and_arrays(self) -> None:
        image = picture(6, 4)
        for given in (image, np.asarray(image), torch.tensor(np.asarray(image))):
            item = opened_item(given, "image[0]", video=False)
            assert isinstance(item.source, Image.Image)
            assert np.array_equal(np.asarray(item.source), np.asarray(image))
            assert not item.video

    def test_frames(self) -> None:
        frames = [picture(6, 4, seed) for seed in range(3)]
        array = np.stack([np.asarray(frame) for frame in frames])
        for given in (frames, array, list(array), torch.tensor(array)):
            assert are_frames(given)
            item = opened_item(given, "video[0]", video=True)
            assert item.video
            assert [np.asarray(one).tolist() for one in item.source] == array.tolist()
        assert not are_frames([frames, frames])
        assert not are_frames([])

    @pytest.mark.parametrize(
        ("given", "what"),
        [
            (np.zeros((4, 6, 3), np.float32), "float32 [4, 6, 3]"),
            (np.zeros((3, 4, 6), np.uint8), "uint8 [3, 4, 6]"),
            (np.zeros((4, 6), np.uint8), "uint8 [4, 6]"),
            ("cafe.png", "str"),
        ],
    )
    def test_anything_else_is_refused_by_what_it_is(self, given: Any, what: str) -> None:
        with pytest.raises(UserError) as caught:
            opened_item(given, "image[3]", video=False)
        assert caught.value.message.startswith("image[3]: siglane reads pictures")
        assert caught.value.message.endswith(what)


@pytest.mark.parametrize("name", ["vila", "ovis2_5"])
def test_a_request_and_what_travels_with_its_images(processors: Any, name: str) -> None:
    processor = processors(name)
    requests = HostRequests(processor, HostConfig(), ImageBudget())
    frames = [picture(64, 48, seed) for seed in range(2)]
    items = [image_item(picture(90, 60), "image[0]"), video_item(frames, "video[0]")]
    requests.pipeline.admit(items)
    for item in items:
        requests.pipeline.read(item)
    video = processor.facts.video
    text = f"First {video.token} then {processor.config.image_token}, which is it?"
    if not video.with_images:
        text, items = f"What is {processor.config.image_token}?", items[:1]
    ids = processor.tokenizer(text).input_ids
    expanded = requests.expand(ids, items)
    again = Asked.from_json(expanded.asked.to_json())
    assert again == expanded.asked
    assert again.layouts(processor.facts) == tuple(item.layout for item in items)
    for index, (number, image) in enumerate(
        zip(expanded.prompt.order, expanded.prompt.in_order(expanded.patches), strict=True)
    ):
        start, rows = expanded.stretch(index)
        assert int(rows.sum()) == image.layout.rows
        assert bool(rows[0])
        assert bool(rows[-1])
        spans = [span for span in expanded.prompt.spans if span.image == index]
        assert (spans[0].start, spans[-1].stop) == (start, start + len(rows))
        packed = Described(image.digest, number, expanded.asked).to_bytes()
        found = Described.from_bytes(packed).patches(image.pixels, processor.facts)
        assert (found.digest, found.layout) == (image.digest, image.layout)


def test_ids_outside_the_vocabulary(processors: Any) -> None:
    """A placeholder's may lie behind the embedding table, where the tokenizer knows it."""
    requests = HostRequests(processors("vila"), HostConfig(), ImageBudget())
    beyond = len(requests.prompts.tokenizer)
    assert requests.prompts.config.language.vocab_size < beyond
    for token_id in (beyond, -1):
        with pytest.raises(UserError, match=f"input_ids names token {token_id}; the vocabulary ends at {beyond - 1}"):
            requests.expand([5, token_id], [])


def test_what_stands_in_the_way_of_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = SimpleNamespace(runner="auto")
    allowed, variables = {"runner": ("auto", None)}, {"HOST_CONNECTOR": "siglane"}
    check_start("model", arguments, allowed, variables, "leave it out")
    with pytest.raises(UserError, match="model cannot be served with runner=pooling: leave it out") as caught:
        check_start("model", SimpleNamespace(runner="pooling"), allowed, variables, "leave it out")
    assert caught.value.param == "runner"
    monkeypatch.setenv("HOST_CONNECTOR", "http")
    with pytest.raises(UserError, match="HOST_CONNECTOR is http; unset it"):
        check_start("model", arguments, allowed, variables, "leave it out")
