"""Offline inference in Python: `LLM` answers questions about pictures, `VisionEncoder` gives their features.

    LLM("folder-or-id").generate({"prompt": "What is this?", "images": ["cat.png"]})[0].text

Pictures are fetched, decoded and cut into patches by a few threads while the engine already computes, a bounded number
of prompts ahead, so any iterable can be passed. Answers come in the order of the prompts, and a prompt that cannot be
answered never takes another one with it. An `LLM` serves one caller at a time, others wait; for many, run
`siglane serve`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import count, islice, repeat
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from PIL import Image
from tqdm import tqdm

from siglane.config.preprocess import LOCAL_DECODE, DecodeConfig
from siglane.engine.config import EngineConfig
from siglane.engine.detokenize import TextStream
from siglane.engine.engine import STEP_PATCHES
from siglane.engine.load import build_engine, placement
from siglane.errors import EngineError, UserError
from siglane.families.model import load_vision
from siglane.families.processor import Processor, load_processor
from siglane.families.stack import VisionStack
from siglane.image.source import MediaPolicy, load_source
from siglane.projector.assemble import projector_grids
from siglane.types import (
    BackendChoice,
    DecodedImage,
    FinishReason,
    ImagePart,
    ImagePatches,
    Message,
    Prompt,
    Request,
    Role,
    SamplingParams,
    Timings,
    TokenDelta,
    TokenLogprob,
    Usage,
)
from siglane.weights.demo import open_model
from siglane.weights.hub import Checkpoint

ImageSource = str | Path | bytes | Image.Image
PromptLike = str | Mapping[str, Any]
ChatMessage = Mapping[str, Any]
Errors = Literal["raise", "return"]
OnText = Callable[[int, str], None]
Item = TypeVar("Item")
Result = TypeVar("Result")

PREPARE_THREADS = 4
PREPARE_AHEAD = 16  # prompts whose pictures are being read or wait for the engine
LOCAL_MEDIA = MediaPolicy(allow_private_addresses=True)  # a local caller may read what this process may
ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The answer to one prompt, or why there is none.

    logprobs: one per output token when asked for; alternatives: the further answers of a request with n > 1, each
    with its own usage; error: set exactly when finish_reason is "error", and the text is then what came before it.
    """

    text: str
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()
    timings: Timings = field(default_factory=Timings)
    alternatives: tuple[Generation, ...] = ()
    error: UserError | EngineError | None = None


class LLM:
    """A model and its engine, in this process.

    model: a checkpoint folder, a hub id, or "demo" for the one that ships with siglane; options: any field of
    `EngineConfig`, by name.
    Raises UserError for a model that cannot be loaded, TypeError for an option that does not exist.
    """

    def __init__(
        self,
        model: str | Path | Checkpoint,
        *,
        revision: str | None = None,
        media: MediaPolicy = LOCAL_MEDIA,
        decode: DecodeConfig = LOCAL_DECODE,
        **options: Any,
    ) -> None:
        config = _engine_config(options)
        checkpoint = model if isinstance(model, Checkpoint) else open_model(model, revision)
        self.processor: Processor = load_processor(checkpoint)
        self._engine = build_engine(checkpoint, self.processor, config)
        self._pictures = _Pictures(media, decode)
        self._one_caller = threading.Lock()
        self._request_ids = (f"offline-{number}" for number in count())

    def generate(
        self,
        prompts: PromptLike | Iterable[PromptLike],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        errors: Errors | None = None,
        progress: bool | None = None,
        on_text: OnText | None = None,
    ) -> list[Generation]:
        """One `Generation` per prompt, in order.

        prompts: a text or `{"prompt": text, "images": [path, URL, bytes or Pillow image, ...]}`, or an iterable of
        them; each is one user message, its images first, through the checkpoint's chat template.
        params: for all prompts, or one for each. errors: "return" puts the error into its row, "raise" raises the
        first one; by default a single prompt raises and several return. progress: a bar on stderr, by default when
        there are several prompts and a terminal. on_text: called with (prompt number, new text) as the text of a
        prompt's first answer appears; it must not call this LLM.
        """
        single = isinstance(prompts, str | Mapping)
        rows: Iterable[Any] = [prompts] if single else prompts
        return self._answer(rows, _one_message, params, errors or ("raise" if single else "return"), progress, on_text)

    def chat(
        self,
        messages: Sequence[ChatMessage] | Iterable[Sequence[ChatMessage]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        errors: Errors | None = None,
        progress: bool | None = None,
        on_text: OnText | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Generation]:
        """Continues one conversation, or each of several, given as OpenAI messages.

        A content is a string or a list of parts: `{"type": "text", "text": ...}`, `{"type": "image_url", "image_url":
        {"url": ...}}` or `{"type": "image", "image": path, URL, bytes or Pillow image}`. The rest is as in `generate`.
        """
        single = isinstance(messages, Sequence) and len(messages) > 0 and isinstance(messages[0], Mapping)
        rows: Iterable[Any] = [messages] if single else messages

        def read(row: Any) -> _Conversation:
            return _conversation(row, chat_template_kwargs or {})

        return self._answer(rows, read, params, errors or ("raise" if single else "return"), progress, on_text)

    def _answer(
        self,
        rows: Iterable[Any],
        read: Callable[[Any], _Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None,
        errors: Errors,
        progress: bool | None,
        on_text: OnText | None,
    ) -> list[Generation]:
        total = len(rows) if isinstance(rows, Sequence) else None
        each = zip(rows, _params_of_each(params, total), strict=False)
        jobs = (_Job(number, row, read, sampling, on_text) for number, (row, sampling) in enumerate(each))
        if progress is None:
            progress = sys.stderr.isatty() and total != 1
        answers = []
        with self._one_caller, contextlib.closing(self._run(jobs)) as running:
            for answer in tqdm(running, total=total, unit="prompt", disable=not progress):
                if answer.error is not None and errors == "raise":
                    raise answer.error
                answers.append(answer)
        return answers

    def _run(self, jobs: Iterator[_Job]) -> Generator[Generation, None, None]:
        """Feeds the engine and yields answers in order. Leaves the engine empty, however it ends."""
        rows: deque[_Row] = deque()  # given out from the left
        preparing: dict[Future[Prompt], _Row] = {}
        running: dict[str, _Answer] = {}
        pool = ThreadPoolExecutor(PREPARE_THREADS, thread_name_prefix="siglane-prepare")
        try:
            while True:
                for job in islice(jobs, PREPARE_AHEAD - len(preparing)):
                    rows.append(_Row(job.number, job.params, job.on_text))
                    preparing[pool.submit(self._prepare, job)] = rows[-1]
                if preparing and not self._engine.has_work:
                    wait(preparing, return_when=FIRST_COMPLETED)
                self._start_prepared(preparing, running)
                for delta in self._engine.step() if self._engine.has_work else ():
                    self._take(delta, running)
                while rows and rows[0].done:
                    yield rows.popleft().generation()
                if not rows:
                    return
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for request_id in running:
                self._engine.abort(request_id)

    def _prepare(self, job: _Job) -> Prompt:
        """Runs in a thread of the pool: everything between the caller's row and the engine."""
        check_sampling(job.params)
        conversation = job.read(job.row)
        pictures = [self._pictures.load(*numbered) for numbered in enumerate(conversation.images)]
        layouts = self.processor.layouts([picture.size for picture in pictures])
        patches = [self.processor.patches(*pair) for pair in zip(pictures, layouts, strict=True)]
        return self.processor.prompt(conversation.messages, patches, conversation.template)

    def _start_prepared(self, preparing: dict[Future[Prompt], _Row], running: dict[str, _Answer]) -> None:
        """Hands prompts to the engine as it gets room, so that only a few wait with their pictures in memory."""
        for future in [future for future in preparing if future.done()]:
            if len(running) >= self._engine.config.max_running:
                return
            row = preparing.pop(future)
            try:
                self._start(row, future.result(), running)
            except Exception as error:
                row.error = _blamed(error)

    def _start(self, row: _Row, prompt: Prompt, running: dict[str, _Answer]) -> None:
        row.prompt_token_ids, row.image_tokens = prompt.token_ids, prompt.image_tokens
        params = row.params
        room = max(1, self._engine.context_length - len(prompt.token_ids))  # the engine refuses prompts without room
        for choice in range(params.n):
            seed = None if params.seed is None else params.seed + choice
            request = Request(
                request_id=next(self._request_ids),
                prompt=prompt,
                sampling=dataclasses.replace(params, n=1, seed=seed),
                max_tokens=min(params.max_tokens or room, room),
            )
            self._engine.add(request)
            answer = _Answer(row, TextStream(self.processor.tokenizer, params.stop))
            running[request.request_id] = answer
            row.answers.append(answer)

    def _take(self, delta: TokenDelta, running: dict[str, _Answer]) -> None:
        answer = running[delta.request_id]
        answer.take(delta)
        if answer.stream.stopped is not None and delta.finish_reason is None:
            answer.last = self._engine.abort(delta.request_id) or delta
            answer.finish_reason = "stop"
        if answer.finish_reason is not None:
            del running[delta.request_id]


class Encoded(NamedTuple):
    """One image. features: `[patches, hidden_size]`; projected: `[rows, llm_hidden]`, None for a plain SigLIP tower."""

    features: torch.Tensor
    projected: torch.Tensor | None


class VisionEncoder:
    """The vision half of a model: a plain SigLIP tower, or tower and projector of a vision-language model.

    Pictures are packed together up to `max_patches` (0: what suits the device) and each is laid out as if alone in its
    request. Features do not depend on what they are packed with.
    """

    def __init__(
        self,
        model: str | Path | Checkpoint,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        attention_backend: BackendChoice = "auto",
        max_patches: int = 0,
        media: MediaPolicy = LOCAL_MEDIA,
        decode: DecodeConfig = LOCAL_DECODE,
    ) -> None:
        config = EngineConfig(
            device=device, vision_dtype=dtype, attention_backend=attention_backend, max_patches=max_patches
        )
        on, _, vision_dtype = placement(config)
        checkpoint = model if isinstance(model, Checkpoint) else open_model(model, revision)
        self._model, self._processor = load_vision(
            checkpoint, device=on, dtype=vision_dtype, attention_backend=attention_backend
        )
        self._max_patches = max_patches or STEP_PATCHES[on.type]
        self._pictures = _Pictures(media, decode)

    def encode(self, images: Iterable[ImageSource]) -> list[torch.Tensor]:
        """Features of each image, `[patches, hidden_size]`, tile after tile, in raster order inside a tile.

        For a plain SigLIP checkpoint the reference's `last_hidden_state`, for a vision-language model what its
        projector reads. UserError for the first image that cannot be used.
        """
        return [encoded.features for encoded in self.run(images, project=False)]

    def project(self, images: Iterable[ImageSource]) -> list[torch.Tensor]:
        """What the language model reads of each image, `[rows, llm_hidden]`. UserError when there is no projector."""
        if not isinstance(self._model, VisionStack):
            raise UserError("a plain SigLIP checkpoint has no projector; use encode", code="no_projector")
        return [encoded.projected for encoded in self.run(images) if encoded.projected is not None]

    def run(self, images: Iterable[ImageSource], *, project: bool = True) -> Iterator[Encoded]:
        """Encodes and, where there is a projector, projects each image, in order and as the images come."""
        group: list[ImagePatches] = []
        for patches in _ahead(self._prepare, images):
            if group and sum(image.layout.patches for image in (*group, patches)) > self._max_patches:
                yield from self._encode(group, project)
                group = []
            group.append(patches)
        yield from self._encode(group, project)

    def _prepare(self, numbered: tuple[int, ImageSource]) -> ImagePatches:
        picture = self._pictures.load(*numbered)
        (layout,) = self._processor.layouts([picture.size])
        return self._processor.patches(picture, layout)

    @torch.inference_mode()
    def _encode(self, group: Sequence[ImagePatches], project: bool) -> list[Encoded]:
        if not (project and isinstance(self._model, VisionStack)):
            return [Encoded(features, None) for features in self._model.features(group)]
        taps = _ProjectorInput()
        projected = self._model.project(group, taps)
        rows = [sum(grid.area for grid in projector_grids(image.layout)) for image in group]
        return list(map(Encoded, torch.split(taps["projector_input"], rows), projected))


class _ProjectorInput(dict[str, torch.Tensor]):
    """Taps that keep what the projector reads; the other intermediates would fill the memory."""

    def __setitem__(self, name: str, value: torch.Tensor) -> None:
        if name == "projector_input":
            super().__setitem__(name, value)


@dataclass(frozen=True, slots=True)
class _Pictures:
    """Loads what a caller names as an image."""

    media: MediaPolicy
    decode: DecodeConfig

    def load(self, number: int, source: object) -> DecodedImage:
        """UserError names the image by its number."""
        where = f"images[{number}]"
        if not isinstance(source, ImageSource):
            message = f"{where} must be a path, URL, bytes or Pillow image, got {type(source).__name__}"
            raise UserError(message, code="invalid_prompt", param=where)
        try:
            return load_source(source, self.media, self.decode)
        except UserError as error:
            raise error.at(where) from error


def _ahead(prepare: Callable[[tuple[int, Item]], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`prepare((number, item))` of every item, in order, computed by a few threads a bounded number of items ahead."""
    waiting: deque[Future[Result]] = deque()
    numbered = enumerate(items)
    pool = ThreadPoolExecutor(PREPARE_THREADS, thread_name_prefix="siglane-prepare")
    try:
        while True:
            waiting.extend(pool.submit(prepare, item) for item in islice(numbered, PREPARE_AHEAD - len(waiting)))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class _Conversation(NamedTuple):
    """One prompt as the processor takes it."""

    messages: tuple[Message, ...]
    images: tuple[ImageSource, ...]
    template: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """One prompt as the caller gave it; `read` interprets it."""

    number: int
    row: Any
    read: Callable[[Any], _Conversation]
    params: SamplingParams
    on_text: OnText | None


@dataclass(slots=True, eq=False)
class _Row:
    """One prompt on its way: first nothing is known, then its tokens, then its answers or an error.

    It holds none of the caller's pictures: rows behind a slow one may wait here for long.
    """

    number: int
    params: SamplingParams
    on_text: OnText | None
    prompt_token_ids: tuple[int, ...] = ()
    image_tokens: int = 0
    answers: list[_Answer] = field(default_factory=list)
    error: UserError | EngineError | None = None

    @property
    def done(self) -> bool:
        if self.error is not None:
            return True
        return len(self.answers) == self.params.n and all(answer.finish_reason for answer in self.answers)

    def generation(self) -> Generation:
        if self.error is not None:
            usage = Usage(len(self.prompt_token_ids), 0, 0, self.image_tokens)
            return Generation(
                text="",
                prompt_token_ids=self.prompt_token_ids,
                output_token_ids=(),
                finish_reason="error",
                usage=usage,
                error=self.error,
            )
        first, *others = (answer.generation() for answer in self.answers)
        return dataclasses.replace(first, alternatives=tuple(others))


@dataclass(slots=True, eq=False)
class _Answer:
    """One request in the engine and what it has said so far."""

    row: _Row
    stream: TextStream
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    last: TokenDelta | None = None
    finish_reason: FinishReason | None = None

    def take(self, delta: TokenDelta) -> None:
        self.last, self.finish_reason = delta, delta.finish_reason
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        text = self.stream.push(delta.token_ids, finished=delta.finish_reason is not None)
        self.pieces.append(text)
        if text and self.row.on_text is not None and self is self.row.answers[0]:
            self.row.on_text(self.row.number, text)

    def generation(self) -> Generation:
        assert self.last is not None
        assert self.finish_reason is not None
        row = self.row
        return Generation(
            text="".join(self.pieces),
            prompt_token_ids=row.prompt_token_ids,
            output_token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            usage=Usage(len(row.prompt_token_ids), len(self.token_ids), self.last.cached_tokens, row.image_tokens),
            logprobs=tuple(self.logprobs),
            timings=self.last.timings,
            error=None if self.last.error is None else _blamed(self.last.error),
        )


def check_sampling(params: SamplingParams) -> None:
    """Raises UserError for a value that no sampler can honour, naming the field."""
    bounds: dict[str, tuple[float, float]] = {
        "max_tokens": (1, math.inf),
        "min_tokens": (0, math.inf),
        "temperature": (0, 2),
        "top_p": (0, 1),
        "min_p": (0, 1),
        "top_k": (-1, math.inf),
        "repetition_penalty": (0.01, 100),
        "frequency_penalty": (-2, 2),
        "presence_penalty": (-2, 2),
        "logprobs": (0, math.inf),
        "n": (1, math.inf),
    }
    for name, (low, high) in bounds.items():
        value = getattr(params, name)
        if value is not None and not low <= value <= high:
            limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise UserError(f"{name} must be {limits}, got {value}", code="invalid_value", param=name)
    if not all(params.stop):
        raise UserError("a stop string must not be empty", code="invalid_value", param="stop")


def _engine_config(options: Mapping[str, Any]) -> EngineConfig:
    known = [option.name for option in dataclasses.fields(EngineConfig)]
    for name in options:
        if name not in known:
            raise TypeError(f"LLM has no option {name!r}; it has {', '.join(known)}")
    return EngineConfig(**options)


def _params_of_each(
    params: SamplingParams | Sequence[SamplingParams] | None, total: int | None
) -> Iterable[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return repeat(params or SamplingParams())
    if total != len(params):
        raise ValueError(
            f"there are {len(params)} params for {'an unknown number of' if total is None else total} prompts"
        )
    return params


def _blamed(error: Exception) -> UserError | EngineError:
    """`error` as a row can carry it; what was not raised on purpose keeps its traceback as the cause."""
    if isinstance(error, UserError | EngineError):
        return error
    unexpected = EngineError(f"{type(error).__name__}: {error}", code="internal_error")
    unexpected.__cause__ = error
    return unexpected


def _one_message(row: PromptLike) -> _Conversation:
    """A prompt of `generate`: one user message, its images first."""
    if isinstance(row, str):
        row = {"prompt": row}
    _check_keys(row, {"prompt", "images"}, "a prompt")
    text, images = row.get("prompt"), row.get("images", ())
    if not isinstance(text, str):
        raise UserError(f"prompt must be a text, got {type(text).__name__}", code="invalid_prompt", param="prompt")
    if not isinstance(images, list | tuple):
        raise UserError(f"images must be a list, got {type(images).__name__}", code="invalid_prompt", param="images")
    parts: tuple[str | ImagePart, ...] = (*map(ImagePart, range(len(images))), text)
    return _Conversation((Message("user", parts),), tuple(images), {})


def _conversation(messages: Sequence[ChatMessage], template: Mapping[str, Any]) -> _Conversation:
    """OpenAI messages. Images are numbered through the whole conversation."""
    images: list[ImageSource] = []
    turns = [_turn(message, f"messages[{number}]", images) for number, message in enumerate(messages)]
    if not turns:
        raise UserError("the conversation has no messages", code="invalid_prompt", param="messages")
    return _Conversation(tuple(turns), tuple(images), template)


def _turn(message: ChatMessage, where: str, images: list[ImageSource]) -> Message:
    _check_keys(message, {"role", "content"}, where)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise UserError(f"{where}: role {role!r} is not one of {', '.join(ROLES)}", code="invalid_prompt", param=where)
    if isinstance(content, str):
        return Message(ROLES[role], (content,))
    if not isinstance(content, list | tuple):
        raise UserError(f"{where}: content must be a text or a list of parts", code="invalid_prompt", param=where)
    parts = (_part(part, f"{where}.content[{number}]", images) for number, part in enumerate(content))
    return Message(ROLES[role], tuple(parts))


def _part(part: Any, where: str, images: list[ImageSource]) -> str | ImagePart:
    kind = part.get("type") if isinstance(part, Mapping) else None
    match kind:
        case "text":
            _check_keys(part, {"type", "text"}, where)
            if not isinstance(part.get("text"), str):
                raise UserError(f"{where}: text must be a text", code="invalid_prompt", param=where)
            return str(part["text"])
        case "image_url":
            _check_keys(part, {"type", "image_url"}, where)
            url = part.get("image_url")
            if isinstance(url, Mapping):
                _check_keys(url, {"url", "detail"}, f"{where}.image_url")
                if url.get("detail") not in (None, "auto"):
                    message = f"{where}: detail {url['detail']!r} is not supported; leave it out or give 'auto'"
                    raise UserError(message, code="unsupported_field", param=where)
                url = url.get("url")
            if not isinstance(url, str):
                raise UserError(f"{where}: url must be a text", code="invalid_prompt", param=where)
            images.append(url)
        case "image":
            _check_keys(part, {"type", "image"}, where)
            images.append(part.get("image"))
        case _:
            message = f"{where}: a part is of type text, image_url or image, got {kind!r}"
            raise UserError(message, code="unsupported_content_type", param=where)
    return ImagePart(len(images) - 1)


def _check_keys(found: Any, known: set[str], where: str) -> None:
    if not isinstance(found, Mapping):
        raise UserError(f"{where} must be a dictionary, got {type(found).__name__}", code="invalid_prompt", param=where)
    unknown = sorted(map(str, found.keys() - known))
    if unknown:
        message = f"{where}: key {unknown[0]!r} is not known; siglane reads {', '.join(sorted(known))}"
        raise UserError(message, code="invalid_prompt", param=where)
