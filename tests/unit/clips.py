"""Small video files for tests, made with PyAV."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

LEVEL = 8  # of red, by which one frame differs from the one before
LEVELS = 32  # then it starts again


def frame(number: int, size: tuple[int, int] = (64, 48)) -> npt.NDArray[np.uint8]:
    """Red by its number, with a white upper left corner."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[..., 0] = LEVEL * (number % LEVELS)
    pixels[: size[1] // 3, : size[0] // 3] = 255
    return pixels


def number_of(pixels: npt.NDArray[np.uint8]) -> int:
    """Which frame these pixels show, modulo `LEVELS`; its red has gone through a lossy codec."""
    height, width = pixels.shape[:2]
    return round(float(pixels[height // 2 :, width // 2 :, 0].mean()) / LEVEL)


def video(
    frames: int,
    *,
    size: tuple[int, int] = (64, 48),
    container: str = "mp4",
    codec: str = "libx264",
    rotation: int = 0,
    group: int = 5,
    **options: str,
) -> bytes:
    """A file whose groups of pictures have `group` frames. rotation: counter-clockwise, as the file announces it."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream: Any = out.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.bit_rate = group, 4_000_000
        stream.codec_context.options = {"crf": "1"} | options if codec == "libx264" else options
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(frames):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame(number, size), "rgb24")))
        out.mux(stream.encode(None))
    return file.getvalue()


def growing(frames: int, size: tuple[int, int], later: tuple[int, int]) -> bytes:
    """A Matroska file whose pictures have another size from the second one on."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as out:
        stream: Any = out.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuvj420p"
        for number in range(frames):
            encoder: Any = av.CodecContext.create("mjpeg", "w")
            encoder.width, encoder.height = later if number else size
            encoder.pix_fmt, encoder.time_base = "yuvj420p", Fraction(1, 10)
            picture = av.VideoFrame.from_ndarray(frame(number, (encoder.width, encoder.height)), "rgb24")
            picture.pts = number
            for packet in [*encoder.encode(picture), *encoder.encode(None)]:
                packet.stream = stream
                out.mux(packet)
    return file.getvalue()


def animation(frames: int, format: str = "GIF", size: tuple[int, int] = (64, 48)) -> bytes:
    file = io.BytesIO()
    first, *others = (Image.fromarray(frame(number, size)) for number in range(frames))
    first.save(file, format, save_all=True, append_images=others, duration=100, loop=0)
    return file.getvalue()
