"""The facts of a family's videos: how frames are chosen. A video is one medium of a request, its frames are tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from siglane.errors import UserError

# how the frames shown are spread over those of a file, as the references do
Spread = Literal["rounded", "floored", "centred"]


@dataclass(frozen=True, slots=True)
class VideoRule:
    """token: the placeholder of a video in a chat template; frames: how many are taken, evenly spread over the file,
    when a request names no number; most_frames: a request may not ask for more.

    spread: "rounded" and "floored" count from the first frame to the last (VILA `round(linspace)`, LLaVA-NeXT
    `linspace(dtype=int)`), "centred" takes the middle of each of `frames` equal parts (Ovis); with_images: whether one
    request may hold videos and images.
    """

    token: str
    frames: int
    most_frames: int
    spread: Spread = "rounded"
    with_images: bool = True

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

    def indices(self, total: int, frames: int) -> tuple[int, ...]:
        """Which of the `total` frames of a file are shown, ascending: `frames` of them, or all of a shorter file."""
        if total <= frames:
            return tuple(range(total))
        match self.spread:
            case "rounded":
                found = np.round(np.linspace(0, total - 1, frames))
            case "floored":
                found = np.floor(np.linspace(0, total - 1, frames))
            case "centred":
                borders = np.arange(frames + 1) * (total / frames)
                found = np.floor((borders[:-1] + borders[1:]) / 2)
        return tuple(int(index) for index in found)
