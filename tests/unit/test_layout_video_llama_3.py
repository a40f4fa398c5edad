"""VideoLLaMA3's sizes, frames, their texts and rows left out: transformers' own code, the authors' rules, budgets."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_json
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil

from siglane.config.preprocess import PreprocessConfig
from siglane.config.projector import llava_projector
from siglane.config.video import VideoRule
from siglane.errors import ConfigError, UserError
from siglane.image.still import settled
from siglane.projector.assemble import assemble, projector_input
from siglane.tiling.bounds import Bounds
from siglane.tiling.rule import CHECKPOINT_LIMITS, ImageBudget, LayoutRule, PatchGeometry, lay_out
from siglane.tiling.video_llama_3 import NativeFrames
from siglane.types import Grid, ImageLayout, ImagePlaceholder, Marker, Medium, MergedFirst, Size, VideoSize
from siglane.verify.references.videollama3_qwen2 import VideoLlama3Qwen2

BLOCK = 28 * 28
# transformers' class defaults, and the authors'
HF = NativeFrames(
    picture=Bounds(14, 4 * BLOCK, 1280 * BLOCK), frame=Bounds(28, 128 * BLOCK, 768 * BLOCK), resample="bicubic",
    drops_still=True,
)  # fmt: skip
AUTHORS = replace(
    HF, picture=Bounds(14, 16 * 196, 16384 * 196), frame=Bounds(28, 16 * BLOCK, 16384 * BLOCK), shared=True
)
MERGED = replace(HF, picture=replace(HF.picture, factor=28))
GEOMETRY = PatchGeometry(14, llava_projector(input_size=3, output_size=4))
STEPPED = VideoRule("<|video_pad|>", 180, 180, spread="stepped", timed=True, fewest=4)
SEGMENTS = VideoRule("<video>", 128, 128, spread="segments", timed=True)


def layout(medium: Medium | tuple[int, int], rule: LayoutRule = HF) -> ImageLayout:
    return lay_out([medium if isinstance(medium, VideoSize) else Size(*medium)], [rule], GEOMETRY)[0]


def frames(width: int, height: int, count: int) -> VideoSize:
    return VideoSize(Size(width, height), count)


@pytest.fixture(scope="module")
def theirs() -> Iterator[Any]:
    """transformers' video processor. Its module imports torchvision for resizing and uses nothing of it here."""
    names = [f"torchvision{inside}" for inside in ("", ".transforms", ".transforms.v2", ".transforms.v2.functional")]
    absent = [] if importlib.util.find_spec("torchvision") else [name for name in names if name not in sys.modules]
    for name in absent:
        sys.modules[name] = ModuleType(name)
    try:
        name = "transformers.models.video_llama_3.video_processing_video_llama_3"
        yield importlib.import_module(name).VideoLlama3VideoProcessor
    finally:
        for name in absent:
            del sys.modules[name]


@pytest.mark.parametrize(
    ("size", "grid", "tokens", "merged", "merged_tokens"),
    [
        ((640, 480), (34, 46), 1564, (34, 46), 391),
        ((224, 224), (16, 16), 256, (16, 16), 64),
        ((30, 40), (5, 4), 20, (6, 4), 6),
        ((1920, 1080), (53, 95), 5035, (52, 94), 1222),
        ((100, 1500), (107, 7), 749, (108, 8), 216),
    ],
)
def test_the_vectors_of_transformers(
    size: tuple[int, int], grid: tuple[int, int], tokens: int, merged: tuple[int, int], merged_tokens: int
) -> None:
    for rule, patches, rows in ((HF, grid, tokens), (MERGED, merged, merged_tokens)):
        found = layout(size, rule)
        assert (found.grids, found.image_tokens, found.pieces) == ((Grid(*patches),), rows, (ImagePlaceholder(rows),))
        assert found.assembly == (None if rule is HF else MergedFirst())


@pytest.mark.parametrize(
    ("sizes", "grid", "tokens"),
    [
        ([(1920, 1080)], (77, 137), 10549),
        ([(4000, 3000)], (110, 147), 16170),
        ([(600, 5)], (1, 44), 44),
        ([(1920, 1080)] * 2, (67, 120), 8040),
    ],
)
def test_the_vectors_of_the_authors(sizes: list[tuple[int, int]], grid: tuple[int, int], tokens: int) -> None:
    for found in lay_out([Size(*size) for size in sizes], [AUTHORS] * len(sizes), GEOMETRY):
        assert (found.grids, found.image_tokens) == ((Grid(*grid),), tokens)


@pytest.mark.parametrize(
    ("medium", "size"),
    [
        (frames(640, 480, 4), (448, 336)),
        (frames(320, 240, 8), (308, 224)),
        (frames(1280, 720, 180), (56, 28)),  # below the lower bound, which does not apply to what was shrunk
    ],
)
def test_the_vectors_of_videos(medium: VideoSize, size: tuple[int, int]) -> None:
    found = layout(medium)
    assert {tile.canvas for tile in found.tiles} == {size}
    assert found.image_tokens == medium.frames * size[0] * size[1] // BLOCK


def test_tokens_of_ten_thousand_sizes_are_transformers(theirs: Any) -> None:
    pictures, chance = VideoLlama3ImageProcessorPil(), random.Random(0)
    videos = SimpleNamespace(size={"shortest_edge": 128 * BLOCK, "longest_edge": 768 * BLOCK})
    videos.patch_size, videos.merge_size, videos.temporal_patch_size = 14, 2, 1
    for _ in range(10_000):
        size = Size(*(round(2 ** chance.uniform(0, 13)) for _ in range(2)))
        if max(size) > 200 * min(size):
            continue  # refused there
        patches = pictures.get_number_of_image_patches(size.height, size.width, {})
        assert layout(size).image_tokens == patches, size
        merged = pictures.get_number_of_image_patches(size.height, size.width, {"merge_size": 2})
        assert layout(size, MERGED).image_tokens == merged // 4, size
        count = round(2 ** chance.uniform(0, 7.5))
        patches = theirs.get_num_of_video_patches(videos, count, size.height, size.width, {})
        found = layout(VideoSize(size, count))
        assert (found.patches, found.image_tokens) == (patches, patches // 4), (size, count)


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_tokens_of_thousands_of_requests_are_the_authors(tmp_path: Any, count: int) -> None:
    """Their `simple_batched_resize` and `batched_resize`, as the reference of `siglane verify` has them."""
    write_json(tmp_path / "processor_config.json", {})
    reference = VideoLlama3Qwen2.__new__(VideoLlama3Qwen2)
    reference.folder, reference.picture = tmp_path, {}
    reference.vision_config = SimpleNamespace(patch_size=14)
    chance = random.Random(1)
    for _ in range(count):
        media: list[Medium] = []
        for _ in range(chance.choice([1, 1, 2, 3])):
            size = Size(*(round(2 ** chance.uniform(3, 12.5)) for _ in range(2)))
            media.append(size if chance.random() < 0.6 else VideoSize(size, chance.randint(1, 150)))
        expected = reference.sizes([_shown(medium) for medium in media])
        found = lay_out(media, [AUTHORS] * len(media), GEOMETRY)
        sizes = [(one.tiles[0].canvas.height, one.tiles[0].canvas.width) for one in found]
        assert sizes == [_at_least_a_block(*pair) for pair in zip(expected, media, strict=True)], media
        assert [one.image_tokens for one in found] == [
            (medium.frames * height * width // BLOCK) if isinstance(medium, VideoSize) else height * width // 196
            for medium, (height, width) in zip(media, sizes, strict=True)
        ]


class Shown(Image.Image):
    """A picture of a size and no memory."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self._size = tuple(size)


def _shown(medium: Medium) -> Any:
    return [Shown(medium.size)] * medium.frames if isinstance(medium, VideoSize) else Shown(medium)


def _at_least_a_block(size: tuple[int, int], medium: Medium) -> tuple[int, int]:
    """Among pictures and videos the authors' code leaves a strip no pixels."""
    factor = 28 if isinstance(medium, VideoSize) else 14
    return max(factor, size[0]), max(factor, size[1])


class TestFrames:
    def test_texts_and_rows(self) -> None:
        found = layout(VideoSize(Size(640, 480), 3, (0.0, 1.04, 2.25), 3.0))
        rows = ImagePlaceholder(13 * 18)
        texts = [Marker(text, isolated=False) for text in ("Time 0.0s:", ",Time 1.0s:", ",Time 2.2s:")]
        assert list(found.pieces) == [texts[0], rows, texts[1], rows, texts[2], rows]
        assert [tile.frame for tile in found.tiles] == [0, 1, 2]
        assert found.projected == found.projector_grids == (Grid(13, 18),) * 3
        assert found.grids == (Grid(26, 36),) * 3

    def test_times_that_nobody_knows_are_seconds(self) -> None:
        texts = [piece.text for piece in layout(frames(64, 48, 3)).pieces if isinstance(piece, Marker)]
        assert texts == ["Time 0.0s:", ",Time 1.0s:", ",Time 2.0s:"]

    def test_so_many_a_second(self) -> None:
        assert STEPPED.indices(300, 180, 30.0) == tuple(range(0, 300, 30))
        assert STEPPED.indices(45, 180, 30.0) == (0, 11, 22, 33)
        assert STEPPED.indices(3, 180, 30.0) == (0, 1, 2)

    def test_frames_are_transformers(self, theirs: Any) -> None:
        chance = random.Random(2)
        facts: Any = SimpleNamespace(num_frames=None, fps=None, temporal_patch_size=1, min_frames=4, max_frames=180)
        for _ in range(1000):
            total, rate = round(2 ** chance.uniform(0, 13)), chance.choice([1.0, 8.0, 23.976, 29.97, 30.0, 60.0])
            fps, most = chance.choice([0.5, 1.0, 2.0, 3.7]), chance.randint(1, 180)
            metadata = SimpleNamespace(total_num_frames=total, fps=rate)
            expected = theirs.sample_frames(facts, metadata, min_frames=min(4, most), max_frames=most, fps=fps)
            rule = replace(STEPPED, fps=fps, fewest=min(4, most))
            assert rule.indices(total, most, rate) == tuple(expected.tolist()), (total, rate, fps, most)

    @pytest.mark.parametrize(
        ("total", "rate", "expected"),
        [
            (300, 30.0, tuple(range(15, 300, 30))),
            (45, 29.97, (14, 43)),
            (10, 30.0, (5,)),
            (1, 0.4, (0,)),
            (30 * 128, 30.0, tuple(np.linspace(0, 30 * 128 - 1, 128, dtype=int).tolist())),
        ],
    )
    def test_the_middle_of_each_second(self, total: int, rate: float, expected: tuple[int, ...]) -> None:
        """The authors' `frame_sample`; from as many seconds on as there may be frames they are spread."""
        assert SEGMENTS.indices(total, 128, rate) == expected


class TestStillRows:
    def preprocess(self, std: tuple[float, float, float] = (0.5, 0.5, 0.5)) -> PreprocessConfig:
        return PreprocessConfig(rule=HF, mean=(0.5, 0.5, 0.5), std=std, rescale=1 / 255)

    def pixels(self, found: ImageLayout, numbers: list[int]) -> torch.Tensor:
        """Frames of equal number are equal, all others differ everywhere."""
        shape = (len(found.tiles), found.grids[0].area, 3 * 14 * 14)
        made = [np.random.default_rng(number).integers(0, 256, shape[1:], dtype=np.uint8) for number in numbers]
        return torch.from_numpy(np.stack(made)).flatten(0, 1)

    def test_the_vector(self) -> None:
        """Four frames of 84 x 56 in equal pairs."""
        found = layout(frames(84, 56, 4))
        assert found.placeholders == (140,) * 4
        assert settled(found, self.pixels(found, [0, 0, 1, 1]), self.preprocess()).placeholders == (140, 1, 140, 1)

    def test_pictures_and_single_frames_are_left_alone(self) -> None:
        for found in (
            layout((64, 48)),
            layout(frames(64, 48, 1)),
            layout(frames(64, 48, 2), replace(HF, drops_still=False)),
        ):
            assert settled(found, self.pixels(found, [0] * len(found.tiles)), self.preprocess()) is found

    @pytest.mark.parametrize("std", [(0.5, 0.5, 0.5), (0.26862954, 0.26130258, 0.27577711)])
    def test_the_mask_is_transformers(self, theirs: Any, std: tuple[float, float, float]) -> None:
        """Changes of some pixels by a few levels, about as large as the threshold."""
        found, generator = layout(frames(84, 56, 5)), np.random.default_rng(0)
        grid, rows = found.grids[0], found.projected[0]
        frame = generator.integers(10, 240, (grid.area, 588))
        stack = []
        for _ in range(5):
            stack.append(frame)
            changed = generator.random(frame.shape) < generator.random((grid.area, 1)) * 0.12
            frame = np.where(changed, frame + generator.integers(-1, 2, frame.shape), frame)
        pixels = torch.from_numpy(np.stack(stack).astype(np.uint8)).flatten(0, 1)
        after = settled(found, pixels, self.preprocess(std))
        normalised = (pixels.float().unflatten(1, (3, 196)) / 255 - 0.5) / torch.tensor(std)[:, None]
        blocks = normalised.reshape(5, rows.h, 2, rows.w, 2, 588).transpose(2, 3).reshape(-1, 588)
        expected = theirs._get_compression_mask(None, blocks, torch.tensor([[5, *grid]]), torch.tensor([2]))
        assert isinstance(after.assembly, MergedFirst)
        assert after.assembly.kept == bytes(expected.int().tolist())
        assert after.placeholders == tuple(expected.unflatten(0, (5, -1)).sum(1).tolist())
        assert 0 < sum(after.placeholders[1:]) < 4 * rows.area - 20

    def test_the_rows_that_are_read_are_the_kept_ones(self) -> None:
        found = layout(frames(84, 56, 3))
        after = settled(found, self.pixels(found, [0, 0, 1]), self.preprocess())
        rows = torch.arange(3 * 140.0)[:, None]
        assert assemble(rows, after, None).flatten().tolist() == [*range(141), *range(280, 420)]
        assert torch.equal(assemble(rows, found, None), rows)


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_how_patches_are_merged(merge: int) -> None:
    """By two the mean of four, by three the one in the middle."""
    rule = replace(HF, frame=Bounds(14 * merge, 1, 768 * BLOCK))
    found = layout(frames(14 * 6, 14 * 12, 2), rule)
    maps = torch.arange(2 * 72.0).reshape(2, 12, 6)
    merged = projector_input(maps.reshape(-1, 1), found).reshape(2, 12 // merge, 6 // merge)
    blocks = maps.reshape(2, 12 // merge, merge, 6 // merge, merge)
    expected = {1: maps, 2: blocks.mean((2, 4)), 3: blocks[:, :, merge // 2, :, merge // 2]}[merge]
    assert torch.allclose(merged, expected)


class TestBudgets:
    @pytest.mark.parametrize("rule", [HF, AUTHORS])
    def test_the_checkpoints_own(self, rule: NativeFrames) -> None:
        assert rule.within(CHECKPOINT_LIMITS) == (rule, "auto")
        assert rule.within(ImageBudget(detail="high")) == (rule, "high")
        with pytest.raises(UserError, match="max_tiles does not apply to this model; it knows max_pixels, min_pixels"):
            rule.within(ImageBudget(max_tiles=4))
        with pytest.raises(UserError, match="max_pixels 100 is less than the 196 of one block"):
            rule.within(ImageBudget(max_pixels=100))

    @pytest.mark.parametrize("rule", [HF, AUTHORS])
    def test_low_is_the_least(self, rule: NativeFrames) -> None:
        low, applied = rule.within(ImageBudget(detail="low"))
        assert applied == "low"
        assert layout((1920, 1080), low).patches <= 16
        assert layout(frames(1920, 1080, 2), low).patches <= 2 * rule.frame.least // 196

    def test_pictures_may_become_larger_or_smaller_than_the_checkpoint_says(self) -> None:
        larger = HF.within(ImageBudget(max_pixels=4_000_000)).rule
        assert layout((1920, 1080), larger).patches == 77 * 137
        assert layout((4000, 3000), HF.within(ImageBudget(detail="original")).rule).patches == 214 * 286
        assert layout((30, 40), HF.within(ImageBudget(min_pixels=196)).rule).patches == 6

    def test_what_all_frames_have_together_stays(self) -> None:
        video = frames(1920, 1080, 4)
        assert layout(video, HF.within(ImageBudget(max_pixels=4_000_000)).rule) == layout(video)
        assert layout(video, HF.within(ImageBudget(max_pixels=60_000)).rule).patches <= 4 * 60_000 // 196

    def test_what_a_request_has_together_stays(self) -> None:
        rule = AUTHORS.within(ImageBudget(max_pixels=10**9)).rule
        assert layout((4000, 3000), rule) == layout((4000, 3000), AUTHORS)

    @given(st.integers(1, 3000), st.integers(1, 3000), st.integers(784, 2_000_000), st.sampled_from([HF, AUTHORS]))
    def test_a_caller_is_never_given_much_more_than_allowed(
        self, width: int, height: int, most: int, rule: NativeFrames
    ) -> None:
        """A strip is at least one block high: it alone may be larger."""
        within = rule.within(ImageBudget(max_pixels=most)).rule
        media: list[Medium] = [Size(width, height), VideoSize(Size(height, width), 2)]
        for found in lay_out(media, [within] * 2, GEOMETRY):
            canvas, factor = found.tiles[0].canvas, 28 if found.frames else 14
            assert canvas.width * canvas.height <= most or min(canvas) == factor


@pytest.mark.parametrize(
    ("bounds", "message"), [((14, 100, 100), "less than one block of 14x14"), ((28, 1, 783), "less than one block")]
)
def test_bounds_that_leave_nothing_are_refused(bounds: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Bounds(*bounds)
