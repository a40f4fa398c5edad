"""The facts of a family's videos: how frames are chosen. A video is one medium of a request, its frames are tiles."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class VideoRule:
    """token: the placeholder of a video in a chat template; frames: how many are taken, evenly spread over the file,
    when a request names no number; most_frames: a request may not ask for more."""

    token: str
    frames: int
    most_frames: int
