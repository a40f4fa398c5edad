"""A request's text and media, made into what a host's engine takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from siglane.errors import UserError
from siglane.families.pipeline import MediaPipeline
from siglane.families.processor import Processor
from siglane.hosts.asked import Asked
from siglane.hosts.largest import largest
from siglane.hosts.view import placeholder_id
from siglane.media.item import MediaItem
from siglane.settings.media import MediaConfig
from siglane.tiling.rule import ImageBudget
from siglane.types import ImagePatches, Prompt, Size

T = TypeVar("T")

FETCH_THREADS = 64  # they wait for web servers most of the time


def in_message(error: UserError, param: str) -> UserError:
    """A host's answer holds the message alone, so the place goes into it."""
    return error if error.message.startswith(param) else UserError(f"{param}: {error.message}", code=error.code)


class MediaReader:
    """Reads the files of items under the media policy of a pipeline, beside what else its process does."""

    def __init__(self, pipeline: MediaPipeline) -> None:
        self.pipeline = pipeline
        self._fetchers = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="siglane-fetch")

    async def read(self, items: Sequence[MediaItem]) -> None:
        """Pictures that the caller opened stay as they are. ImageError names a bad item."""
        await asyncio.gather(*(self.elsewhere(item.source, partial(self.pipeline.read, item)) for item in items))

    async def elsewhere(self, source: object, job: Callable[[], T]) -> T:
        """What `job` gives, which reads `source`, on another thread. What comes over the network waits on threads of
        its own: a slow web server holds up nobody else."""
        remote = isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))
        return await asyncio.get_running_loop().run_in_executor(self._fetchers if remote else None, job)


@dataclass(frozen=True, slots=True, eq=False)
class Expanded:
    """token_ids: the prompt's, with a placeholder that the host knows at the places of images; patches: of the
    request's media, in the order of `asked`."""

    token_ids: list[int]
    prompt: Prompt
    patches: tuple[ImagePatches, ...]
    asked: Asked

    def stretch(self, index: int) -> tuple[int, torch.Tensor]:
        """Where image `index` of the prompt begins, and, bool from there to its last row, what is a row: text may stand
        between its tiles."""
        spans = [span for span in self.prompt.spans if span.image == index]
        start, stop = spans[0].start, spans[-1].stop
        rows = torch.zeros(stop - start, dtype=torch.bool)
        for span in spans:
            rows[span.start - start : span.stop - start] = True
        return start, rows


class HostRequests:
    """The stages of a request in the process of a host that reads them.

    image_limits: the operator's ceiling (`ImageBudget.under`). UserError when the model does not know one of them.
    """

    def __init__(self, prompts: Processor, config: MediaConfig, image_limits: ImageBudget) -> None:
        self.prompts, self.config, self._image_limits = prompts, config, image_limits
        self.pipeline = MediaPipeline.for_clients(config, prompts.facts, image_limits, in_message)
        self.reader = MediaReader(self.pipeline)

    def expand(self, text: str | Sequence[int], items: Sequence[MediaItem], longest: int | None = None) -> Expanded:
        """text: a prompt that the view's chat template has rendered, or the ids of one, a placeholder for each item;
        items: admitted and read; longest: more than the tokens that are accepted. UserError for what is wrong with
        this request alone, a prompt that is too long before anything is decoded."""
        self.pipeline.lay_out(items)
        text = text if isinstance(text, str) else self._read(text)
        prompt = self.prompts.rendered_prompt(text, [item.layout for item in items])
        length = len(prompt.token_ids)
        if longest is not None and length >= longest:
            message = f"the prompt has {length} tokens, {longest - 1} are accepted; ask for fewer or smaller images"
            raise UserError(message, code="context_length_exceeded")
        for item in items:
            self.pipeline.preprocess(item)
        prompt = prompt.settled(prompt.in_order([item.patches for item in items]))
        ids = list(prompt.token_ids)
        place = placeholder_id(self.prompts.config)
        for span in prompt.spans:
            ids[span.start : span.stop] = [place] * (span.stop - span.start)
        return Expanded(ids, prompt, tuple(item.patches for item in items), Asked.of(items))

    def frames(self) -> int:
        """Of a video whose request names no number; 0 where the model reads none."""
        video = self.prompts.facts.video
        return 0 if video is None else video.count(None, self.config.max_video_frames)

    def largest(self, *, video: bool, most_rows: int) -> tuple[Size, int]:
        """`hosts/largest.py: largest` of what a request may hold."""
        frames, pixels = self.frames() if video else 0, self.config.max_image_pixels
        return largest(self.prompts.facts, self._image_limits, frames=frames, most_pixels=pixels, most_rows=most_rows)

    def _read(self, ids: Sequence[int]) -> str:
        # a placeholder's may lie behind the embedding table
        vocabulary = max(self.prompts.config.language.vocab_size, len(self.prompts.tokenizer))
        if outside := [token_id for token_id in ids if not 0 <= token_id < vocabulary]:
            message = f"input_ids names token {outside[0]}; the vocabulary ends at {vocabulary - 1}"
            raise UserError(message, code="invalid_value")
        return str(self.prompts.tokenizer.decode(list(ids)))
