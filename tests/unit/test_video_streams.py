"""What a player would show of a video file: the stream, the part of it, and which way up."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from clips import frame, number_of, video
from picture_corpus import GIF_COLOURS, GIF_PALETTE, JPEG, WHITE, WIDE, webp_files
from picture_files import gif, gif_control, gif_image

from siglane.config.preprocess import DecodeConfig
from siglane.config.video import VideoRule
from siglane.errors import ImageError
from siglane.image.video import decode_video, read_video_size
from siglane.types import Size, VideoSize

CONFIG = DecodeConfig()
EVERY = VideoRule("<video>", 8, 64)
SMALL, LARGE = (64, 48), (96, 64)
DEFAULT, NONE, COVER = Disposition.default, Disposition(0), Disposition.attached_pic


@dataclass
class Track:
    """A video stream whose frames are numbered from `first`; a cover is one picture."""

    size: tuple[int, int]
    first: int
    disposition: Disposition = NONE
    codec: str = "mpeg4"
    frames: int = 6
    stream: Any = field(init=False)

    def add(self, out: Any) -> None:
        self.stream = out.add_stream(self.codec, rate=10)
        self.stream.width, self.stream.height = self.size
        self.stream.pix_fmt = "yuvj420p" if self.codec == "mjpeg" else "yuv420p"
        self.stream.codec_context.bit_rate = 4_000_000
        self.stream.disposition = self.disposition

    def packets(self) -> Iterable[Any]:
        for number in range(1 if self.disposition & COVER else self.frames):
            picture = av.VideoFrame.from_ndarray(frame(self.first + number, self.size), "rgb24")
            yield from self.stream.encode(picture)
        yield from self.stream.encode(None)


def file_of(*tracks: Track, container: str = "matroska", sound: bool = False, attached: bool = False) -> bytes:
    """attached: with a cover picture in Matroska's way."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as out:
        if sound:
            audio: Any = out.add_stream("aac", rate=8000, layout="mono")
        if attached:
            out.add_attachment("cover.jpg", "image/jpeg", JPEG)
        for track in tracks:
            track.add(out)
        for track in tracks:
            for packet in track.packets():
                out.mux(packet)
        if sound:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            silence.sample_rate, silence.pts, silence.time_base = 8000, 0, Fraction(1, 8000)
            out.mux([*audio.encode(silence), *audio.encode(None)])
    return stream.getvalue()


def numbers(data: bytes, frames: int = 64) -> list[int]:
    clip = decode_video(data, EVERY, frames, CONFIG)
    assert clip.size == read_video_size(data, EVERY, frames, CONFIG)
    return [number_of(pixels) for pixels in clip.frames]


@pytest.mark.parametrize("container", ["matroska", "mp4", "mov"])
@pytest.mark.parametrize(
    ("tracks", "first", "size"),
    [
        ([Track(SMALL, 0, DEFAULT), Track(LARGE, 16)], 0, SMALL),
        ([Track(LARGE, 0), Track(SMALL, 16, DEFAULT)], 16, SMALL),
        ([Track(SMALL, 0, DEFAULT), Track(LARGE, 16, DEFAULT)], 16, LARGE),
        ([Track(LARGE, 0, DEFAULT), Track(LARGE, 16, DEFAULT)], 0, LARGE),
    ],
    ids=["the default one", "the default one behind", "the larger one", "the first one"],
)
def test_of_several_streams_the_one_that_a_player_shows(
    tracks: list[Track], first: int, size: tuple[int, int], container: str
) -> None:
    data = file_of(*tracks, container=container)
    assert numbers(data) == list(range(first, first + 6))
    assert read_video_size(data, EVERY, 6, CONFIG) == VideoSize(Size(*size), 6)


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_cover_picture_is_no_video(container: str) -> None:
    tracks = [Track(SMALL, 0)]
    if container == "mp4":
        tracks.insert(0, Track(LARGE, 30, COVER, codec="mjpeg"))
    data = file_of(*tracks, container=container, sound=True, attached=container == "matroska")
    with av.open(io.BytesIO(data)) as opened:
        assert any(stream.disposition & COVER for stream in opened.streams.video)
    assert numbers(data) == list(range(6))


@pytest.mark.parametrize(
    ("tracks", "found"), [([], "no video"), ([Track(LARGE, 30, COVER, codec="mjpeg")], "a cover picture, but no video")]
)
def test_sound_alone_is_refused_by_what_is_missing(tracks: list[Track], found: str) -> None:
    data = file_of(*tracks, container="mp4", sound=True)
    for read in (read_video_size, decode_video):
        with pytest.raises(ImageError, match=f"^the file holds {found}$") as caught:
            read(data, EVERY, 6, CONFIG)
        assert caught.value.code == "video_decode_failed"


# a, b, c, d of the track header's matrix -> what a player does with the stored frame
MIRRORED = {
    (1, 0, 0, 1): lambda pixels: pixels,
    (-1, 0, 0, 1): lambda pixels: pixels[:, ::-1],
    (1, 0, 0, -1): lambda pixels: pixels[::-1],
    (-1, 0, 0, -1): lambda pixels: pixels[::-1, ::-1],
    (0, 1, -1, 0): lambda pixels: np.rot90(pixels, -1),
    (0, -1, 1, 0): lambda pixels: np.rot90(pixels),
    (0, 1, 1, 0): lambda pixels: pixels.swapaxes(0, 1),
    (0, -1, -1, 0): lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
}


@pytest.mark.parametrize("matrix", MIRRORED)
def test_a_video_is_turned_and_mirrored_as_its_track_says(matrix: tuple[int, int, int, int]) -> None:
    plain = video(3)
    a, b, c, d = (value << 16 for value in matrix)
    told = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    place = plain.index(identity, plain.index(b"tkhd"))
    data = plain[:place] + told + plain[place + len(told) :]
    stored, shown = (decode_video(one, EVERY, 2, CONFIG).frames for one in (plain, data))
    for before, after in zip(stored, shown, strict=True):
        assert np.array_equal(MIRRORED[matrix](before), after)
    height, width = shown[0].shape[:2]
    assert read_video_size(data, EVERY, 2, CONFIG) == VideoSize(Size(width, height), 2)


@pytest.mark.parametrize("start", [-4, -1, 0, 7])
@pytest.mark.parametrize("reordered", ["0", "2"])
def test_frames_before_the_beginning_are_not_shown(start: int, reordered: str) -> None:
    """An MP4's edit list begins at 0; what is decoded before is what players drop."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4", options={"avoid_negative_ts": "disabled"}) as out:
        track: Any = out.add_stream("libx264", rate=10)
        track.width, track.height, track.pix_fmt = *SMALL, "yuv420p"
        track.codec_context.options = {"crf": "1", "bf": reordered, "g": "12"}
        for number in range(12):
            picture = av.VideoFrame.from_ndarray(frame(number), "rgb24")
            picture.pts, picture.time_base = number + start, Fraction(1, 10)
            out.mux(track.encode(picture))
        out.mux(track.encode(None))
    data = stream.getvalue()
    with av.open(io.BytesIO(data)) as opened:
        played = [number_of(picture.to_ndarray(format="rgb24")) for picture in opened.decode(video=0)]
    assert played == list(range(max(0, -start), 12))
    assert numbers(data) == played


def test_a_gif_is_drawn_by_the_standards_disposals() -> None:
    """Four frames, each as the one before leaves the screen: kept, cleared, put back; beside FFmpeg."""
    row = gif_image((0, 0, 4, 1), [0, 1, 2, 3])
    middle = gif_image((1, 0, 2, 1), [3, 0])
    red, green, blue, yellow = GIF_COLOURS.tolist()
    expected = {
        0: [[red, yellow, red, yellow], [red, green, red, yellow]],
        1: [[red, yellow, red, yellow], [red, green, red, yellow]],
        2: [[blue, yellow, red, blue], [blue, green, blue, blue]],
        3: [[blue, yellow, red, blue], [blue, green, blue, blue]],
    }
    for disposal, later in expected.items():
        parts = (gif_control(disposal=disposal), row), (gif_control(disposal=disposal), middle)
        last = gif_control(), gif_image((1, 0, 1, 1), [1])
        data = gif((4, 1), *parts[0], *parts[1], *last, palette=GIF_PALETTE, background=2)
        clip = decode_video(data, EVERY, 64, CONFIG)
        assert [pixels.tolist() for pixels in clip.frames] == [[[red, green, blue, yellow]], *([row] for row in later)]
        with av.open(io.BytesIO(data), format="gif") as opened:
            beside = [picture.to_ndarray(format="rgb24").tolist() for picture in opened.decode(video=0)]
        assert beside == [pixels.tolist() for pixels in clip.frames]
    cleared = gif((4, 1), gif_control(0, 2), row, gif_control(0), middle, palette=GIF_PALETTE, background=2)
    clip = decode_video(cleared, EVERY, 64, CONFIG)
    assert clip.frames[1].tolist() == [[WHITE, yellow, WHITE, WHITE]]


def test_an_animation_that_is_turned_is_upright() -> None:
    turned = next(case for case in webp_files() if case.name == "webp exif behind the pixels, flags 8")
    clip = decode_video(turned.data, EVERY, 8, CONFIG)
    assert clip.size == read_video_size(turned.data, EVERY, 8, CONFIG)
    assert np.array_equal(clip.frames[0], turned.rgb)
    assert clip.size.size.height == WIDE
