"""An image or a video of a request: what a caller names, and what the stages of `families/pipeline.py` make of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from siglane.tiling.rule import CHECKPOINT_LIMITS, Budgeted, ImageBudget
from siglane.types import Detail, ImageLayout, ImagePatches, Medium

ImageSource = str | Path | bytes | Image.Image


@dataclass(slots=True, eq=False)
class MediaItem:
    """One medium of a request, which advances through the stages of `MediaPipeline`; each fills its fields in.

    The caller says: source: a URL, path, bytes, open Pillow image or list of frames, checked when it is read;
    param: where the request names it, as `messages[0].content[1]`; image_limits: what it asks for; frames: of a video,
    None for what the model takes.
    """

    source: object
    param: str
    image_limits: ImageBudget = CHECKPOINT_LIMITS  # `admit` makes them those that are in force
    video: bool = False
    frames: int | None = None  # `admit` makes it the number that is shown
    # admit: the detail the caller asked for, and the family's rule within the limits
    requested: Detail = field(init=False, repr=False)
    rule: Budgeted = field(init=False, repr=False)
    pictures: list[MediaItem] = field(default_factory=list, repr=False)  # of a video given as frames: those shown
    # read: bytes of the file, or the picture that the caller has opened; `preprocess` lets it go
    file: bytes | Image.Image | None = field(default=None, repr=False)
    # measure: from the file's header, unless the caller knows only the size and gives it
    size: Medium | None = None
    layout: ImageLayout = field(init=False, repr=False)  # lay_out
    # preprocess: the patches, and the seconds that decoding and cutting took
    patches: ImagePatches = field(init=False, repr=False)
    decoding: float = field(default=0.0, repr=False)
    cutting: float = field(default=0.0, repr=False)
