"""The facts of a family's videos: how frames are chosen. A video is one medium of a request, its frames are tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from siglane.errors import ConfigError, UserError

# how the frames shown are spread over those of a file, as the references do
Spread = Literal["rounded", "floored", "centred", "paced", "stepped", "segments"]

LEFT_OUT = 1  # seconds at both ends of a long video


@dataclass(frozen=True, slots=True)
class VideoRule:
    """token: the placeholder of a video in a chat template; frames: how many are taken, evenly spread over the file,
    when a request names no number; most_frames: a request may not ask for more.

    spread: "rounded" and "floored" count from the first frame to the last (VILA `round(linspace)`, LLaVA-NeXT
    `linspace(dtype=int)`), "centred" takes the middle of each of `frames` equal parts (Ovis), "paced" takes `fps` of
    each second and `frames` at most (SmolVLM2), "stepped" as many of each second in equal steps from the first on, at
    least `fewest` of a video (VideoLLaMA3 in transformers), "segments" the middle of each 1 / `fps` of a second, and
    of a video that is too long for that `frames` as "floored" (its authors); with_images: whether one request may hold
    videos and images; timed: whether the model is told when each frame is shown.
    """

    token: str
    frames: int
    most_frames: int
    spread: Spread = "rounded"
    with_images: bool = True
    fps: float = 1.0
    timed: bool = False
    fewest: int = 1

    def __post_init__(self) -> None:
        if self.fps <= 0:
            raise ConfigError(f"{self.fps:g} frames of a video's second cannot be shown")

    def count(self, wanted: int | None, most: int | None = None) -> int:
        """How many frames of a video are shown. UserError `invalid_num_frames` for a wish that cannot be met.

        most: a server's own limit; the family's number is lowered to it in silence, a client's wish is refused.
        """
        limit = self.most_frames if most is None else min(most, self.most_frames)
        if wanted is None:
            return min(self.frames, limit)
        if not 1 <= wanted <= limit:
            message = f"num_frames {wanted} is not between 1 and {limit}"
            raise UserError(message, code="invalid_num_frames", param="num_frames")
        return wanted

    def indices(self, total: int, frames: int, rate: float | None = None) -> tuple[int, ...]:
        """Which of the `total` frames of a file are shown, ascending: `frames` of them, or all of a shorter file; fewer
        where so many a second are. rate: frames of the file in a second, None where nobody knows."""
        if self.spread == "paced" and rate is not None:
            return self._paced(total, frames, rate)
        if self.spread == "segments" and rate is not None and total / rate < frames:
            length = int(min(max(rate // self.fps, 1), total))
            return tuple(range(length // 2, total, length))
        if self.spread == "stepped" and rate is not None:
            wanted = max(total / rate * self.fps, self.fewest)
            frames = max(1, math.floor(min(wanted, frames, total)))
        if total <= frames:
            return tuple(range(total))
        match self.spread:
            case "rounded":
                found = np.round(np.linspace(0, total - 1, frames))
            case "stepped":
                step = total / frames
                found = np.trunc((np.arange(math.ceil(total / step)) * step).astype(np.float32))
            case "floored" | "paced" | "segments":
                found = np.floor(np.linspace(0, total - 1, frames))
            case "centred":
                borders = np.arange(frames + 1) * (total / frames)
                found = np.floor((borders[:-1] + borders[1:]) / 2)
        return tuple(int(index) for index in found)

    def _paced(self, total: int, frames: int, rate: float) -> tuple[int, ...]:
        """transformers `SmolVLMVideoProcessor.sample_frames`, which compares seconds with `frames * fps`."""
        seconds = total / rate
        first, last = 0, total - 1
        if seconds - 2 * LEFT_OUT > frames * self.fps:
            first, last = int(LEFT_OUT * rate), min(int(total - LEFT_OUT * rate), last)
        if first >= last:
            first, last = 0, total - 1
        wanted = max(1, min(round(self.fps * seconds), frames))
        return tuple(int(index) for index in np.unique(np.linspace(first, last, wanted, dtype=int)))
