"""An image or a video of a request: what a caller names, and what the stages of `families/pipeline.py` make of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from PIL import Image

from siglane.errors import UserError, blaming
from siglane.tiling.rule import CHECKPOINT_LIMITS, LIMITS, Budgeted, ImageBudget
from siglane.types import Detail, ImageLayout, ImagePatches, Medium

ImageSource = str | Path | bytes | Image.Image
VideoSource = str | Path | bytes | list[ImageSource] | tuple[ImageSource, ...]

BUDGET_KEYS = frozenset({"detail", *LIMITS})


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


def image_item(given: object, param: str, key: str = "image") -> MediaItem:
    """An image source, or a dictionary `{key: source}` with limits."""
    if not isinstance(given, Mapping):
        return MediaItem(given, param)
    check_keys(given, {key, *BUDGET_KEYS}, param)
    return MediaItem(given.get(key), param, read_limits(given, param))


def video_item(given: object, param: str, key: str = "video") -> MediaItem:
    """A video source, or a dictionary `{key: source}` with `num_frames` and limits."""
    if not isinstance(given, Mapping):
        return MediaItem(given, param, video=True)
    check_keys(given, {key, "num_frames", *BUDGET_KEYS}, param)
    frames = given.get("num_frames")
    if frames is not None and not _is_int(frames):
        raise UserError(f"{param}: num_frames must be a number", code="invalid_prompt", param=param)
    return MediaItem(given.get(key), param, read_limits(given, param), video=True, frames=frames)


def url_item(given: object, param: str, *, video: bool = False) -> MediaItem:
    """What stands in OpenAI's `image_url` or `video_url`: a URL, or a dictionary `{"url": URL}` as above."""
    item = video_item(given, param, "url") if video else image_item(given, param, "url")
    if not isinstance(item.source, str):
        raise UserError(f"{param}: url must be a text", code="invalid_prompt", param=param)
    return item


def read_limits(fields: Mapping[str, Any], param: str) -> ImageBudget:
    """The limits among the keys of a dictionary; None is as good as absent. UserError names the value at fault."""
    found = {name: fields[name] for name in BUDGET_KEYS if fields.get(name) is not None}
    for name, value in found.items():
        if name == "detail":
            fits, expected = value in get_args(Detail), f"one of {', '.join(get_args(Detail))}"
        elif name == "grid_pinpoints":
            fits, expected = _are_pairs(value), "pairs of height and width"
        else:
            fits, expected = _is_int(value), "a number"
        if not fits:
            raise UserError(f"{param}: {name} must be {expected}, got {value!r}", code="invalid_prompt", param=param)
    if "grid_pinpoints" in found:
        found["grid_pinpoints"] = tuple((height, width) for height, width in found["grid_pinpoints"])
    with blaming(param):
        return ImageBudget(**found)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_pairs(value: object) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(map(_is_int, pair)) for pair in value
    )


def check_keys(found: Any, known: set[str], param: str) -> None:
    if not isinstance(found, Mapping):
        raise UserError(f"{param} must be a dictionary, got {type(found).__name__}", code="invalid_prompt", param=param)
    unknown = sorted(map(str, found.keys() - known))
    if unknown:
        message = f"{param}: key {unknown[0]!r} is not known; siglane reads {', '.join(sorted(known))}"
        raise UserError(message, code="invalid_prompt", param=param)
