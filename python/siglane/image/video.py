"""A video file -> the frames that the model is shown, upright RGB, and nothing else of it decoded.

MP4, WebM, Matroska, MOV and AVI are read by PyAV (the extra `siglane[video]`), GIF and WebP by Pillow. The container is
told by its first bytes and never guessed by FFmpeg: its playlist formats would open what a stranger names.
Non-square pixels are shown as they are stored, as the references' readers do.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageSequence

from siglane.config.preprocess import DecodeConfig
from siglane.config.video import VideoRule
from siglane.errors import ImageError, UserError
from siglane.image import gif, webp
from siglane.image.decode import from_pil, read_size
from siglane.image.header import Header
from siglane.types import DecodedImage, DecodedVideo, Size, VideoSize

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# FFmpeg has hundreds of decoders, most of them for formats nobody sends
CODECS = ("h264", "hevc", "av1", "vp8", "vp9", "mpeg4", "mpeg2video", "mjpeg")
SLOWEST = 1e-3  # frames a second; a file that states fewer is damaged
ACCEPTED = "MP4, MOV, WebM, Matroska, AVI, GIF, WebP"


def read_video_size(data: bytes, rule: VideoRule, frames: int, config: DecodeConfig) -> VideoSize:
    """Size of the upright first frame, and how many of at most `frames` the file has. Decodes that frame alone.

    What `decode_video` returns has exactly these. Raises ImageError: video_format_not_allowed, video_decode_failed,
    video_too_long, image_too_large; UserError missing_extra without PyAV.
    """
    with _as_video_error():
        if (animation := _animation(data, config)) is not None:
            chosen = animation.chosen(rule, frames, config)
            return _measured(animation.header.upright, chosen, animation.count, animation.rate, rule)
        with _film(data, config) as film:
            chosen = film.chosen(rule, frames)
            return _measured(film.size(len(chosen)), chosen, film.count, film.rate, rule)


def decode_video(data: bytes, rule: VideoRule, frames: int, config: DecodeConfig) -> DecodedVideo:
    """At most `frames` frames, chosen by `rule`. Only the groups of pictures that hold them are decoded.

    A frame that is missing in a damaged file is replaced by the next one that is not. Raises as `read_video_size`, and
    ImageError video_timeout after `config.video_seconds`.
    """
    with _as_video_error():
        if (animation := _animation(data, config)) is not None:
            return _decode_animation(animation, rule, frames, config)
        with _film(data, config) as film:
            chosen = film.chosen(rule, frames)
            film.size(len(chosen))
            return DecodedVideo.of([DecodedImage.from_rgb(film.picture(index)) for index in chosen])


def chosen_pictures(pictures: Sequence[Any], rule: VideoRule, frames: int | None) -> list[Any]:
    """The pictures of a clip that a caller gives as a list: all of them, or `frames` of them chosen as from a file.

    UserError when there are none, or more than the model may be shown.
    """
    if not pictures:
        raise UserError("a video must have at least one frame", code="invalid_prompt")
    count = rule.count(frames if frames is not None else len(pictures))
    return [pictures[index] for index in rule.indices(len(pictures), count)]


def _chosen(total: int, rate: float | None, rule: VideoRule, frames: int, config: DecodeConfig) -> tuple[int, ...]:
    _check_length(total, config)
    return rule.indices(total, frames, rate)


def _measured(size: Size, chosen: Sequence[int], total: int, rate: float | None, rule: VideoRule) -> VideoSize:
    """Times as if frames were shown equally long, as the references have them."""
    if not rule.timed or rate is None:
        return VideoSize(size, len(chosen))
    return VideoSize(size, len(chosen), tuple(index / rate for index in chosen), total / rate)


def _check_length(frames: int, config: DecodeConfig) -> None:
    if frames > config.max_file_frames:
        raise ImageError(f"the video has more than {config.max_file_frames} frames", code="video_too_long")


def _check_time(begun: float, config: DecodeConfig) -> None:
    if time.monotonic() - begun > config.video_seconds:
        message = f"decoding the video took more than {config.video_seconds:g} seconds"
        raise ImageError(message, code="video_timeout")


def _check_clip(size: Size, frames: int, config: DecodeConfig) -> None:
    pixels = size.width * size.height
    if pixels > config.max_pixels:
        message = f"the video has {size.width} x {size.height} pixels; at most {config.max_pixels} are accepted"
        raise ImageError(message, code="image_too_large")
    if pixels * frames > config.max_video_pixels:
        message = (
            f"{frames} frames of {size.width} x {size.height} pixels are more than the {config.max_video_pixels} "
            "pixels accepted; ask for fewer frames"
        )
        raise ImageError(message, code="image_too_large")


class _Film:
    """An open file: the packets of its video in decoding order, and a decoder that only goes forward.

    Frames are named by when they are shown: their time stamp, or their number where the file has no usable stamps.
    """

    def __init__(self, stream: VideoStream, packets: Sequence[Packet[VideoStream]], config: DecodeConfig) -> None:
        rate = float(stream.average_rate or 0)
        self.rate = rate if rate >= SLOWEST else None  # frames a second, None where the file does not say
        self._codec, self._packets, self._config = stream.codec_context, packets, config
        shown = [packet.pts for packet in packets if not packet.is_discard]
        stamps = sorted({stamp for stamp in shown if stamp is not None})
        self._stamped = len(stamps) == len(shown)
        self._shown = stamps if self._stamped else list(range(len(shown)))
        self._begun = time.monotonic()
        self._next = 0  # packet to be decoded next
        self._decoded: deque[tuple[int, VideoFrame]] = deque()
        self._count = 0
        self._last: VideoFrame | None = None
        self._stored: Size | None = None

    @property
    def count(self) -> int:
        return len(self._shown)

    def chosen(self, rule: VideoRule, frames: int) -> tuple[int, ...]:
        """Which of the frames are to be shown."""
        if not self._shown:
            raise _undecodable()
        return _chosen(self.count, self.rate, rule, frames, self._config)

    def frame(self, shown: int) -> VideoFrame:
        """The first frame shown at or after `shown`, the last one where there is none. Times must not go back."""
        start = self._start(shown)
        if start > self._next:
            self._codec.flush_buffers()
            self._decoded.clear()
            self._next = start
        while True:
            while self._decoded:
                when, self._last = self._decoded[0]
                if when >= shown:
                    return self._last
                self._decoded.popleft()
            if self._next > len(self._packets):
                if self._last is None:
                    raise _undecodable()
                return self._last
            self._decode_next()

    def picture(self, index: int) -> npt.NDArray[np.uint8]:
        """The upright frame as RGB u8 `[H, W, 3]`. A video keeps the size that its memory was checked for."""
        frame = self.frame(self._shown[index])
        if (frame.width, frame.height) != self._stored:
            raise ImageError("the video changes its size, which is not supported", code="video_decode_failed")
        return _upright(frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False), _display_matrix(frame))

    def size(self, frames: int) -> Size:
        """Of the file's first frame, upright; checked, for so many frames in memory. To be asked before any frame."""
        first = self.frame(self._shown[0])
        self._stored = width, height = Size(first.width, first.height)
        _check_clip(self._stored, frames, self._config)
        return Size(height, width) if _is_sideways(_display_matrix(first)) else self._stored

    def _start(self, shown: int) -> int:
        """The packet to begin with: the last key frame before the wanted one, in decoding order and on the screen."""
        if not self._stamped:
            return 0
        stamps = [packet.pts for packet in self._packets]
        for number in range(stamps.index(shown), -1, -1):
            stamp = stamps[number]
            if self._packets[number].is_keyframe and stamp is not None and stamp <= shown:
                return number
        return 0

    def _decode_next(self) -> None:
        _check_time(self._begun, self._config)
        packet = self._packets[self._next] if self._next < len(self._packets) else None  # None: what is left inside
        self._next += 1
        for frame in self._codec.decode(packet):
            when = frame.pts if self._stamped else self._count
            if when is None:
                raise _undecodable()
            self._count += 1
            self._decoded.append((when, frame))


@contextmanager
def _film(data: bytes, config: DecodeConfig) -> Iterator[_Film]:
    container_format = _container_format(data)
    try:
        import av
    except ImportError:
        message = "reading video files needs PyAV; pip install 'siglane[video]', or send the frames as a list of images"
        raise UserError(message, code="missing_extra") from None
    # no protocol: a file must not be able to name another one
    options = {"protocol_whitelist": "none"}
    file = BytesIO(data)
    with av.open(file, "r", format=container_format, options=options, metadata_errors="ignore") as container:
        stream = _shown_stream(container.streams.video)
        codec = stream.codec_context
        if codec is None or codec.name.removeprefix("lib").replace("dav1d", "av1") not in CODECS:
            name = "an unknown codec" if codec is None else codec.name
            message = f"video in {name} is not accepted; accepted codecs: {', '.join(CODECS)}"
            raise ImageError(message, code="video_format_not_allowed")
        _check_clip(Size(codec.width, codec.height), 1, config)
        codec.options = {"max_pixels": str(config.max_pixels)}
        packets = []
        for packet in container.demux(stream):
            if packet.size > 0:  # the last one is empty and says that the file ends
                packets.append(packet)
            _check_length(len(packets), config)
        yield _Film(stream, packets, config)


def _shown_stream(streams: Sequence[VideoStream]) -> VideoStream:
    """The one that a player shows: no cover picture, rather one marked as default, rather a larger one, the first."""
    from av.stream import Disposition

    shown = [stream for stream in streams if not stream.disposition & Disposition.attached_pic]
    if not shown:
        what = "a cover picture, but no video" if streams else "no video"
        raise ImageError(f"the file holds {what}", code="video_decode_failed")
    return max(shown, key=lambda one: (bool(one.disposition & Disposition.default), _pixels(one)))


def _pixels(stream: VideoStream) -> int:
    codec = stream.codec_context  # None where FFmpeg has no decoder
    return 0 if codec is None else codec.width * codec.height


def _container_format(data: bytes) -> str:
    """FFmpeg's name of the container, by its first bytes."""
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip") and data[8:12] not in (b"avif", b"heic"):
        return "mov"
    if data.startswith(b"\x1aE\xdf\xa3"):
        return "matroska"
    if data.startswith(b"RIFF") and data[8:12] == b"AVI ":
        return "avi"
    raise ImageError(f"not a video that is accepted; accepted formats: {ACCEPTED}", code="video_format_not_allowed")


@dataclass(frozen=True, slots=True)
class _Animation:
    """seconds: that all frames together are shown, 0 where nobody knows; pictures: the frames as they are shown, each
    valid until the next is asked for."""

    header: Header
    count: int
    seconds: float
    pictures: Iterator[Image.Image]

    @property
    def rate(self) -> float | None:
        """Frames a second, None where nobody knows."""
        return self.count / self.seconds if self.seconds else None

    def chosen(self, rule: VideoRule, frames: int, config: DecodeConfig) -> tuple[int, ...]:
        """Which of the frames are to be shown."""
        return _chosen(self.count, self.rate, rule, frames, config)


def _animation(data: bytes, config: DecodeConfig) -> _Animation | None:
    """The file's frames when it is a GIF or WebP that may be read; None for any other."""
    if data.startswith(b"GIF8"):
        read_size(data, config)  # refuses what is too large or not allowed
        header, most = gif.read_header(BytesIO(data)), config.max_file_frames + 1
        delays = [frame.delay for frame in islice(gif.read_frames(BytesIO(data)), most)]
        pictures = gif.draw(gif.read_frames(BytesIO(data)), header.stored)
        return _Animation(header, len(delays), sum(delays) / 100, pictures)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        read_size(data, config)
        image: Any = webp.open_image(BytesIO(data))
        header, seconds = webp.read_header(BytesIO(data)), webp.duration(BytesIO(data))
        return _Animation(header, image.n_frames, seconds, ImageSequence.Iterator(image))
    return None


def _decode_animation(animation: _Animation, rule: VideoRule, frames: int, config: DecodeConfig) -> DecodedVideo:
    chosen = animation.chosen(rule, frames, config)
    _check_clip(animation.header.stored, len(chosen), config)
    begun, decoded = time.monotonic(), []
    for number, picture in enumerate(islice(animation.pictures, chosen[-1] + 1)):  # each is drawn over the one before
        _check_time(begun, config)
        if number in chosen:
            decoded.append(from_pil(picture, config, animation.header.orientation))
    return DecodedVideo.of(decoded)


def _display_matrix(frame: VideoFrame) -> tuple[int, ...]:
    """a, b, c, d, where a pixel (x, y) is shown at (a x + c y, b x + d y); libavutil/display.h."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    return (1, 0, 0, 1) if matrix is None else tuple(np.frombuffer(bytes(matrix), np.int32)[[0, 1, 3, 4]].tolist())


def _is_sideways(matrix: tuple[int, ...]) -> bool:
    return abs(matrix[1]) > abs(matrix[0])


def _upright(rgb: npt.NDArray[np.uint8], matrix: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Turned by quarters and mirrored as the matrix says. Cameras write no other angles."""
    a, b, c, d = matrix
    sideways = _is_sideways(matrix)
    to_right, to_bottom = (c, b) if sideways else (a, d)
    turned = rgb.swapaxes(0, 1) if sideways else rgb
    return np.ascontiguousarray(turned[:: -1 if to_bottom < 0 else 1, :: -1 if to_right < 0 else 1])


@contextmanager
def _as_video_error() -> Iterator[None]:
    # what a damaged file makes FFmpeg and Pillow raise is of many kinds, and none of it may reach a client
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception:
        raise _undecodable() from None


def _undecodable() -> ImageError:
    return ImageError("the video cannot be decoded: its data are damaged or incomplete", code="video_decode_failed")
