"""Video files: which frames are shown, upright and in order, nothing else decoded; damage is an ImageError."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_nvila_checkpoint
from clips import LEVELS, animation, frame, growing, number_of, video
from hypothesis import given, settings
from hypothesis import strategies as st

from siglane.config.preprocess import DecodeConfig
from siglane.config.projector import vila_projector
from siglane.config.video import Spread, VideoRule
from siglane.errors import ImageError, UserError
from siglane.families.pipeline import MediaPipeline
from siglane.families.processor import load_processor
from siglane.image.resize import resize
from siglane.image.tile import render_tiles
from siglane.image.video import _Film, chosen_pictures, decode_video, read_video_size
from siglane.media.item import MediaItem
from siglane.tiling.rule import PatchGeometry
from siglane.tiling.vila import VilaTiling
from siglane.types import DecodedImage, DecodedVideo, Size, VideoSize
from siglane.weights.hub import open_checkpoint

RULE = VideoRule("<video>", 8, 64)
CONFIG = DecodeConfig()
FORMATS = [
    ("mp4", "libx264"),
    ("mov", "libx264"),
    ("matroska", "libx264"),
    ("webm", "libvpx-vp9"),
    ("webm", "libvpx"),
    ("avi", "mpeg4"),
    ("avi", "mjpeg"),
]


def numbers(clip: DecodedVideo) -> list[int]:
    return [number_of(pixels) for pixels in clip.frames]


class TestSpread:
    def test_frames_are_those_of_the_references(self) -> None:
        """VILA's round(linspace), LLaVA-NeXT's linspace(dtype=int), Ovis' middles; worked out by hand for 10 and 4."""
        expected: dict[Spread, tuple[int, ...]] = {
            "rounded": (0, 3, 6, 9), "floored": (0, 3, 6, 9), "centred": (1, 3, 6, 8),
        }  # fmt: skip
        for spread, found in expected.items():
            assert VideoRule("", 8, 8, spread).indices(10, 4) == found
        assert VideoRule("", 8, 8, "rounded").indices(25, 8) == (0, 3, 7, 10, 14, 17, 21, 24)
        assert VideoRule("", 8, 8, "floored").indices(25, 8) == (0, 3, 6, 10, 13, 17, 20, 24)

    @given(st.integers(1, 100_000), st.integers(1, 300), st.sampled_from(["rounded", "floored", "centred"]))
    @settings(max_examples=300, deadline=None, database=None)
    def test_they_are_as_many_as_there_can_be_and_ascend(self, total: int, frames: int, spread: Spread) -> None:
        found = VideoRule("", 8, 8, spread).indices(total, frames)
        assert len(found) == min(total, frames)
        assert found == tuple(sorted(set(found)))
        assert 0 <= found[0] <= found[-1] < total

    def test_a_wish_beyond_the_model_is_refused_by_number(self) -> None:
        assert RULE.count(None) == 8
        assert RULE.count(64) == 64
        assert RULE.count(None, most=4) == 4
        for wanted, most in ((65, None), (0, None), (-1, None), (5, 4)):
            with pytest.raises(UserError, match=rf"num_frames {wanted} is not between 1 and") as caught:
                RULE.count(wanted, most)
            assert caught.value.code == "invalid_num_frames"


@pytest.mark.parametrize(("container", "codec"), FORMATS)
@pytest.mark.parametrize("spread", ["rounded", "centred"])
def test_the_frames_asked_for_come_in_order(container: str, codec: str, spread: Spread) -> None:
    data, rule = video(25, container=container, codec=codec), VideoRule("<video>", 8, 64, spread)
    clip = decode_video(data, rule, 8, CONFIG)
    assert numbers(clip) == list(rule.indices(25, 8))
    assert clip.size == read_video_size(data, rule, 8, CONFIG) == VideoSize(Size(64, 48), 8)
    white, black = clip.frames[0][4, 4], clip.frames[0][-4, -4]
    assert white.min() > 245
    assert black.max() < 10


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_animations_are_videos_too(format: str) -> None:
    data = animation(12, format)
    clip = decode_video(data, RULE, 4, CONFIG)
    assert numbers(clip) == list(RULE.indices(12, 4))
    assert clip.size == read_video_size(data, RULE, 4, CONFIG)


TIMED = VideoRule("<video>", 8, 64, "paced", fps=2.0, timed=True)
EVERY_FORMAT = {
    **{f"{container} {codec}": video(25, container=container, codec=codec) for container, codec in FORMATS},
    **{format: animation(25, format) for format in ("GIF", "WEBP")},
}


@pytest.mark.parametrize("data", EVERY_FORMAT.values(), ids=EVERY_FORMAT)
def test_times_and_pace_are_those_of_the_file(data: bytes) -> None:
    """Ten frames a second; two of each of its 2.5 seconds are shown."""
    measured = read_video_size(data, TIMED, 8, CONFIG)
    assert measured.frames == 5
    assert measured.seconds == pytest.approx((0.0, 0.6, 1.2, 1.8, 2.4))
    assert measured.duration == pytest.approx(2.5)
    assert numbers(decode_video(data, TIMED, 8, CONFIG)) == [0, 6, 12, 18, 24]
    assert numbers(decode_video(data, TIMED, 3, CONFIG)) == [0, 12, 24]


def test_an_animation_that_does_not_say_how_long() -> None:
    data = re.sub(rb"(\x21\xf9\x04.)\x0a", b"\\1\0", animation(3))
    assert read_video_size(data, TIMED, 8, CONFIG) == VideoSize(Size(64, 48), 3)


@pytest.mark.parametrize("rate", [None, 0, 1e-9])
def test_a_rate_that_no_video_has_is_none(rate: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Film, "__init__", _with_rate(_Film.__init__, rate))
    assert read_video_size(video(3), TIMED, 8, CONFIG) == VideoSize(Size(64, 48), 3)


def _with_rate(init: Callable[..., None], rate: float | None) -> Callable[..., None]:
    """A film of a stream that states another rate."""

    class Stream:
        average_rate = rate

        def __init__(self, stream: Any) -> None:
            self.codec_context = stream.codec_context

    return lambda self, stream, packets, config: init(self, Stream(stream), packets, config)


def test_a_short_file_has_fewer_frames() -> None:
    data = video(3)
    assert numbers(decode_video(data, RULE, 8, CONFIG)) == [0, 1, 2]
    assert read_video_size(data, RULE, 8, CONFIG).frames == 3
    assert numbers(decode_video(video(1), RULE, 8, CONFIG)) == [0]


@pytest.mark.parametrize(("rotation", "corner"), [(90, (-4, 4)), (-90, (4, -4)), (180, (-4, -4))])
def test_a_turned_video_is_upright(rotation: int, corner: tuple[int, int]) -> None:
    """rotation 90: shown turned counter-clockwise, so that the upper left corner comes to the lower left."""
    data = video(4, rotation=rotation)
    clip = decode_video(data, RULE, 2, CONFIG)
    size = Size(64, 48) if rotation == 180 else Size(48, 64)
    assert clip.size == read_video_size(data, RULE, 2, CONFIG) == VideoSize(size, 2)
    shown = clip.frames[0]
    corners = {(y, x): int(shown[y, x].min()) for y in (4, -4) for x in (4, -4)}
    assert max(corners, key=lambda place: corners[place]) == corner


def test_only_the_groups_that_hold_a_frame_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    real = _Film._decode_next

    def counting(film: _Film) -> None:
        decoded.append(film._next)
        real(film)

    monkeypatch.setattr(_Film, "_decode_next", counting)
    data = video(300, group=10, bf="0")
    found = numbers(decode_video(data, VideoRule("", 3, 3), 3, CONFIG))
    assert found == [number % LEVELS for number in (0, 150, 299)]
    assert len(decoded) <= 3 * 12
    decoded.clear()
    read_video_size(data, RULE, 3, CONFIG)
    assert len(decoded) <= 10


@pytest.mark.parametrize("options", [{"x264-params": "open-gop=1"}, {"bf": "3"}, {"tune": "zerolatency"}])
def test_frames_around_a_key_frame_are_exact(options: dict[str, str]) -> None:
    data, every = video(25, group=6, **options), VideoRule("", 8, 64)
    assert numbers(decode_video(data, every, 25, CONFIG)) == list(range(25))
    for count in range(1, 25):
        assert numbers(decode_video(data, every, count, CONFIG)) == list(every.indices(25, count))


class TestRefusals:
    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"hello, world" * 20,
            b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n",
            b"ffconcat version 1.0\nfile /etc/passwd\n",
            b"RIFF\0\0\0\0WAVE" + b"\0" * 100,
            b"<svg/>",
        ],
    )
    def test_what_is_no_video_is_never_guessed_at(self, data: bytes) -> None:
        for read in (read_video_size, decode_video):
            with pytest.raises(ImageError) as caught:
                read(data, RULE, 8, CONFIG)
            assert caught.value.code == "video_format_not_allowed"

    def test_a_codec_that_nobody_sends_is_refused_by_name(self) -> None:
        with pytest.raises(ImageError, match="ffv1 is not accepted") as caught:
            read_video_size(video(3, container="matroska", codec="ffv1"), RULE, 8, CONFIG)
        assert caught.value.code == "video_format_not_allowed"

    @pytest.mark.parametrize(
        ("config", "code"),
        [
            (DecodeConfig(max_pixels=64 * 48 - 1), "image_too_large"),
            (DecodeConfig(max_video_pixels=8 * 64 * 48 - 1), "image_too_large"),
            (DecodeConfig(max_file_frames=9), "video_too_long"),
            (DecodeConfig(video_seconds=-1.0), "video_timeout"),
        ],
    )
    @pytest.mark.parametrize("data", [video(10), animation(10)], ids=["mp4", "gif"])
    def test_caps(self, data: bytes, config: DecodeConfig, code: str) -> None:
        with pytest.raises(ImageError) as caught:
            decode_video(data, RULE, 8, config)
        assert caught.value.code == code

    def test_a_video_that_grows_is_refused_before_its_large_frames_fill_the_memory(self) -> None:
        assert decode_video(growing(3, (64, 48), (64, 48)), RULE, 3, CONFIG).size.frames == 3
        data = growing(3, (64, 48), (640, 480))
        assert read_video_size(data, RULE, 3, CONFIG) == VideoSize(Size(64, 48), 3)
        with pytest.raises(ImageError, match="changes its size"):
            decode_video(data, RULE, 3, CONFIG)
        with pytest.raises(ImageError) as caught:  # the decoder itself stops at what one frame may have
            decode_video(data, RULE, 3, DecodeConfig(max_pixels=64 * 48))
        assert caught.value.code == "video_decode_failed"

    def test_damaged_files_are_refused_or_decoded_to_the_frames_that_were_announced(self) -> None:
        generator = np.random.default_rng(0)
        refused = 0
        for container, codec in FORMATS:
            whole = video(12, container=container, codec=codec)
            for trial in range(25):
                broken = bytearray(whole[: len(whole) * 2 // 3] if trial < 2 else whole)
                for place in generator.integers(0, len(broken), 20 * (trial > 0)):
                    broken[place] = generator.integers(0, 256)
                try:
                    announced = read_video_size(bytes(broken), RULE, 4, CONFIG)
                    assert len(decode_video(bytes(broken), RULE, 4, CONFIG).frames) == announced.frames
                except ImageError:
                    refused += 1
        assert refused > 10

    def test_without_pyav_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "av", None)
        with pytest.raises(UserError, match=r"siglane\[video\]") as caught:
            decode_video(b"\0\0\0\x18ftypisom", RULE, 8, CONFIG)
        assert caught.value.code == "missing_extra"
        assert numbers(decode_video(animation(4), RULE, 2, CONFIG)) == [0, 3]  # Pillow's own formats need none


def test_sources_of_a_local_caller(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(video(6))
    write_nvila_checkpoint(tmp_path / "model")
    pipeline = MediaPipeline(load_processor(open_checkpoint(tmp_path / "model")).facts, decode=CONFIG)

    def load(source: object, frames: int) -> bytes:
        item = MediaItem(source, "videos[0]", video=True, frames=frames)
        pipeline.admit([item])
        pipeline.read(item)
        measured, clip = pipeline.measure(item), pipeline.decode(item)
        assert clip.size == measured == VideoSize(Size(64, 48), frames)
        return clip.digest

    digests = {load(source, 3) for source in (path, str(path), path.as_uri(), path.read_bytes())}
    assert len(digests) == 1
    assert load(path, 2) not in digests
    with pytest.raises(ImageError, match=r"nowhere\.mp4"):
        load(tmp_path / "nowhere.mp4", 2)


class TestPictures:
    """A clip given as a list of pictures."""

    def test_all_of_them_or_as_many_as_asked_for(self) -> None:
        rule = VideoRule("", 2, 6)
        assert chosen_pictures(list("abcdef"), rule, None) == list("abcdef")
        assert chosen_pictures(list("abcdefghij"), rule, 4) == ["a", "d", "g", "j"]
        with pytest.raises(UserError, match="num_frames 7"):
            chosen_pictures(list("abcdefg"), rule, None)
        with pytest.raises(UserError, match="at least one frame"):
            chosen_pictures([], rule, None)

    def test_frames_of_other_sizes_are_resized_to_the_first_ones_target(self) -> None:
        clip = DecodedVideo.of([DecodedImage.from_rgb(frame(n, size)) for n, size in enumerate([(64, 48), (30, 90)])])
        rule = tiling("squash")
        layout = rule.video(clip.size, GEOMETRY)
        drawn = render_tiles(clip.frames, layout)
        for pixels, source in zip(drawn, clip.frames, strict=True):
            assert np.array_equal(pixels, resize(source, Size(56, 56), "bicubic"))

    def test_a_model_that_pads_wants_one_size(self) -> None:
        clip = DecodedVideo.of([DecodedImage.from_rgb(frame(n, size)) for n, size in enumerate([(64, 48), (30, 90)])])
        with pytest.raises(ImageError) as caught:
            render_tiles(clip.frames, tiling("pad").video(clip.size, GEOMETRY))
        assert caught.value.code == "frame_sizes_differ"
        same = DecodedVideo.of([DecodedImage.from_rgb(frame(n)) for n in range(2)])
        assert len(render_tiles(same.frames, tiling("pad").video(same.size, GEOMETRY))) == 2


GEOMETRY = PatchGeometry(14, vila_projector("mlp_downsample_3x3_fix", input_size=3, output_size=4))


def tiling(name: str) -> VilaTiling:
    return VilaTiling(
        tile=Size(56, 56), resample="bicubic", tiling=name, min_tiles=1, max_tiles=12,  # type: ignore[arg-type]
        s2_scales=(), fill=(127, 127, 127),
    )  # fmt: skip
