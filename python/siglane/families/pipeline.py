"""What a Python caller may name as an image or a video, and how it is loaded, a few threads ahead of its use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar, get_args

from PIL import Image

from siglane.config.preprocess import DecodeConfig
from siglane.errors import UserError
from siglane.families.processor import ImageProcessor
from siglane.families.report import ImageReport, report_image
from siglane.image.video import chosen_pictures
from siglane.media.source import MediaPolicy, load_source, load_video
from siglane.tiling.rule import LIMITS, ImageBudget, LayoutRule, no_images, no_video
from siglane.types import DecodedImage, DecodedVideo, Detail, ImagePatches

P = ParamSpec("P")
Item = TypeVar("Item")
Result = TypeVar("Result")

ImageSource = str | Path | bytes | Image.Image
VideoSource = str | Path | bytes | list[ImageSource] | tuple[ImageSource, ...]

BUDGET_KEYS = frozenset({"detail", *LIMITS})
LOCAL_MEDIA = MediaPolicy(allow_private_addresses=True)  # a local caller may read what this process may
VIDEO_BYTES = 1 << 30  # of a video's file from a web server
PREPARE_THREADS = 4
PREPARE_AHEAD = 16  # prompts whose pictures are being read or wait for the engine


@dataclass(frozen=True, slots=True)
class MediaItem:
    """An image or a video of one prompt. source: what the caller gave, checked when it is loaded; budget: the limits
    named beside it; where: its place, for messages; frames: of a video, None for what the model takes."""

    source: object
    budget: ImageBudget
    where: str
    video: bool = False
    frames: int | None = None


def image_item(given: object, where: str) -> MediaItem:
    """An image source, or a dictionary `{"image": source}` with a budget."""
    if not isinstance(given, Mapping):
        return MediaItem(given, ImageBudget(), where)
    check_keys(given, {"image", *BUDGET_KEYS}, where)
    return MediaItem(given.get("image"), read_budget(given, where), where)


def video_item(given: object, where: str) -> MediaItem:
    """A video source, or a dictionary `{"video": source}` with `num_frames` and a budget."""
    if not isinstance(given, Mapping):
        return MediaItem(given, ImageBudget(), where, video=True)
    check_keys(given, {"video", "num_frames", *BUDGET_KEYS}, where)
    frames = given.get("num_frames")
    if frames is not None and not _is_int(frames):
        raise UserError(f"{where}: num_frames must be a number", code="invalid_prompt", param=where)
    return MediaItem(given.get("video"), read_budget(given, where), where, video=True, frames=frames)


def read_budget(fields: Mapping[str, Any], where: str) -> ImageBudget:
    """The budget among the keys of a dictionary; None is as good as absent. UserError names the value at fault."""
    found = {name: fields[name] for name in BUDGET_KEYS if fields.get(name) is not None}
    for name, value in found.items():
        if name == "detail":
            fits, expected = value in get_args(Detail), f"one of {', '.join(get_args(Detail))}"
        elif name == "grid_pinpoints":
            fits, expected = _are_pairs(value), "pairs of height and width"
        else:
            fits, expected = _is_int(value), "a number"
        if not fits:
            raise UserError(f"{where}: {name} must be {expected}, got {value!r}", code="invalid_prompt", param=where)
    if "grid_pinpoints" in found:
        found["grid_pinpoints"] = tuple((height, width) for height, width in found["grid_pinpoints"])
    try:
        return ImageBudget(**found)
    except UserError as error:
        raise error.at(where) from None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_pairs(value: object) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(map(_is_int, pair)) for pair in value
    )


class Prepared(NamedTuple):
    """The images and videos of one prompt, and what became of each."""

    patches: list[ImagePatches]
    reports: tuple[ImageReport, ...]


@dataclass(frozen=True, slots=True)
class Media:
    """Loads what a caller names as an image or a video and cuts it. budget: where an item names no limit of its own;
    video: how the model reads videos, None for one that does not."""

    policy: MediaPolicy
    decode: DecodeConfig
    processor: ImageProcessor
    budget: ImageBudget

    def __post_init__(self) -> None:
        if self.processor.sees:
            self._rule.within(self.budget)  # UserError for a limit that the model cannot honour, before any image

    @property
    def _rule(self) -> LayoutRule:
        return self.processor.facts.preprocess.rule

    def prepare(self, items: Sequence[MediaItem]) -> Prepared:
        """All items of one prompt. UserError names the one at fault by its place."""
        if not items:
            return Prepared([], ())
        if not self.processor.sees:
            raise no_images().at(items[0].where)
        loaded = [_blaming(item, self._load, item) for item in items]
        budgets = [item.budget.over(self.budget) for item in items]
        for item, budget in zip(items, budgets, strict=True):
            _blaming(item, self._rule.within, budget)
        layouts = self.processor.layouts([one.size for one in loaded], budgets)
        patches = [
            _blaming(item, self.processor.patches, one, layout)
            for item, one, layout in zip(items, loaded, layouts, strict=True)
        ]
        reports = (
            report_image(layout, self._rule, budget.detail, budget)
            for layout, budget in zip(layouts, budgets, strict=True)
        )
        return Prepared(patches, tuple(reports))

    def _load(self, item: MediaItem) -> DecodedImage | DecodedVideo:
        return self._clip(item) if item.video else self._picture(item.source, item.where)

    def _clip(self, item: MediaItem) -> DecodedVideo:
        rule, source = self.processor.facts.video, item.source
        if rule is None:
            raise no_video()
        if isinstance(source, list | tuple):
            pictures = chosen_pictures(source, rule, item.frames)
            return DecodedVideo.of([self._picture(picture, item.where) for picture in pictures])
        if not isinstance(source, str | Path | bytes):
            message = f"{item.where} must be a path, URL, bytes or list of frames, got {type(source).__name__}"
            raise UserError(message, code="invalid_prompt")
        policy = replace(self.policy, max_bytes=max(self.policy.max_bytes, VIDEO_BYTES))
        return load_video(source, policy, rule, rule.count(item.frames), self.decode)

    def _picture(self, source: object, where: str) -> DecodedImage:
        if not isinstance(source, ImageSource):
            message = f"{where} must be a path, URL, bytes or Pillow image, got {type(source).__name__}"
            raise UserError(message, code="invalid_prompt")
        return load_source(source, self.policy, self.decode)


def _blaming(item: MediaItem, function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
    try:
        return function(*args, **kwargs)
    except UserError as error:
        raise error.at(item.where) from error


def check_keys(found: Any, known: set[str], where: str) -> None:
    if not isinstance(found, Mapping):
        raise UserError(f"{where} must be a dictionary, got {type(found).__name__}", code="invalid_prompt", param=where)
    unknown = sorted(map(str, found.keys() - known))
    if unknown:
        message = f"{where}: key {unknown[0]!r} is not known; siglane reads {', '.join(sorted(known))}"
        raise UserError(message, code="invalid_prompt", param=where)


def ahead(
    prepare: Callable[[tuple[int, Item]], Result], items: Iterable[Item], most: int = PREPARE_AHEAD
) -> Iterator[Result]:
    """`prepare((number, item))` of every item, in order, computed by a few threads at most `most` items ahead."""
    waiting: deque[Future[Result]] = deque()
    numbered = enumerate(items)
    pool = ThreadPoolExecutor(PREPARE_THREADS, thread_name_prefix="siglane-prepare")
    try:
        while True:
            waiting.extend(pool.submit(prepare, item) for item in islice(numbered, most - len(waiting)))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
