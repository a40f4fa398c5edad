"""`LLM`: a model and its engine in this process, fed by a few threads that prepare prompts."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import count, islice, repeat
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from siglane.config.preprocess import LOCAL_DECODE, DecodeConfig
from siglane.engine.answers.answer import Answer
from siglane.engine.constraints.constraint import check_constraint
from siglane.engine.constraints.tool_grammar import tool_constraint
from siglane.engine.process.load import build_engine
from siglane.engine.sampling.labels import check_closed, closed_template, label_ids
from siglane.engine.sampling.parameters import check_for_model, in_plain_shapes, sampling_defaults
from siglane.errors import blaming
from siglane.families.ahead import PREPARE_AHEAD, PREPARE_THREADS
from siglane.families.pipeline import MediaPipeline, report_image
from siglane.families.processor import Processor, load_processor
from siglane.families.prompt.questions import asked_behind
from siglane.families.report import ImageReport
from siglane.llm.decide import Asked, decide
from siglane.llm.generation import Generation, OnText, Row, blamed
from siglane.llm.prompts import PromptLike, one_message
from siglane.llm.stepper import Stepper
from siglane.media.messages import ChatMessage, Conversation, read_messages
from siglane.media.policy import LOCAL_MEDIA, MediaPolicy
from siglane.media.tools import read_tools
from siglane.settings.engine import EngineConfig
from siglane.settings.options import options_of
from siglane.tiling.rule import CHECKPOINT_LIMITS, ImageBudget
from siglane.types import Decision, ImagePatches, Prompt, Question, Request, SamplingParams, TokenDelta, ToolUse
from siglane.weights.demo import opened
from siglane.weights.hub import Checkpoint

Errors = Literal["raise", "return"]


class LLM:
    """A model and its engine, in this process.

    model: a checkpoint folder, a hub id, or "demo" for the one that ships with siglane; adapter: folder or hub id of a
    LoRA adapter; verify_weights: whether weight files are compared with their SHA-256, None: where a folder states it;
    budget: the limits of images that name none of their own; options: any field of `EngineConfig`, by name.
    sampling_defaults: what a prompt without `params` gets: the values of the checkpoint's generation_config.json,
    greedy where it states no temperature. Raises UserError for a model that cannot be loaded or does not know a limit,
    TypeError for an option that does not exist.
    """

    def __init__(
        self,
        model: str | Path | Checkpoint,
        *,
        revision: str | None = None,
        adapter: str | Path | None = None,
        verify_weights: bool | None = None,
        media: MediaPolicy = LOCAL_MEDIA,
        decode: DecodeConfig = LOCAL_DECODE,
        budget: ImageBudget = CHECKPOINT_LIMITS,
        **options: Any,
    ) -> None:
        config = _engine_config(options)
        checkpoint = opened(model, revision, adapter=adapter, verify_weights=verify_weights)
        self.processor: Processor = load_processor(checkpoint)
        self.sampling_defaults = sampling_defaults(self.processor.config, SamplingParams())
        self._media = MediaPipeline(self.processor.config.images, budget, media, decode)
        self._engine = build_engine(checkpoint, self.processor.config, self.processor.tokenizer, config)
        self._stepper = Stepper(self._engine)
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
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Generation]:
        """One `Generation` per prompt, in order.

        prompts: a text or `{"prompt": text, "images": [path, URL, bytes or Pillow image, ...], "videos": [path, URL,
        bytes or list of frames, ...]}`, or an iterable of them; each is one user message, its images first, then its
        videos, through the checkpoint's chat template. An image may also be `{"image": source, "detail": "low",
        "max_pixels": ...}` with any field of `ImageBudget`, a video `{"video": source, "num_frames": 8, ...}`.
        params: for all prompts, or one for each; by default `sampling_defaults`. errors: "return" puts the error into
        its row, "raise" raises the first one; by default a single prompt raises and several return. progress: a bar on
        stderr, by default when there are several prompts and a terminal. on_text: called with (prompt number, new text)
        as the text of a prompt's first answer appears, its reasoning left out; it must not call this LLM.
        chat_template_kwargs: the chat template's own variables, such as `{"enable_thinking": False}`.
        """
        single = isinstance(prompts, str | Mapping)
        rows: Iterable[Any] = [prompts] if single else prompts
        jobs = self._jobs(rows, one_message, params, on_text, chat_template_kwargs, None)
        return self._answer(jobs, _length(rows), errors or ("raise" if single else "return"), progress)

    def chat(
        self,
        messages: Sequence[ChatMessage] | Iterable[Sequence[ChatMessage]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        errors: Errors | None = None,
        progress: bool | None = None,
        on_text: OnText | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
    ) -> list[Generation]:
        """Continues one conversation, or each of several, given as OpenAI messages.

        A content is a string or a list of parts: `{"type": "text", "text": ...}`, `{"type": "image_url", "image_url":
        {"url": ...}}` or `{"type": "image", "image": path, URL, bytes or Pillow image}`, the same with `video_url` and
        `{"type": "video", "video": path, URL, bytes or list of frames}`. The fields of a budget and `num_frames` stand
        beside the url, the image or the video. Earlier answers may be given as OpenAI's clients hold them: without a
        content beside `tool_calls` or a `refusal`, which is read as the answer's text. Calls and results of tools are
        written where the chat template has a place for them, else refused. No model reads an answer's
        `reasoning_content` and `annotations`, or a participant's `name`.

        tools: functions that the answers may call, as OpenAI's API has them; their calls are `Generation.tool_calls`;
        tool_choice: "auto", "required", "none" or `{"type": "function", "function": {"name": ...}}`. UserError where
        the chat template tells the model of none. The rest is as in `generate`.
        """
        use = read_tools(tools, tool_choice, parallel_tool_calls)
        single = isinstance(messages, Sequence) and len(messages) > 0 and isinstance(messages[0], Mapping)
        rows: Iterable[Any] = [messages] if single else messages
        jobs = self._jobs(rows, read_messages, params, on_text, chat_template_kwargs, use)
        return self._answer(jobs, _length(rows), errors or ("raise" if single else "return"), progress)

    def decide(
        self,
        prompt: PromptLike,
        questions: Sequence[Question],
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Decision]:
        """How likely the labels of each question are as the answer to it, without a token generated.

        prompt: what the questions are about, as in `generate`; its images are encoded once, and every question is put
        behind it. Thinking is closed where the model reasons. UserError for labels that are empty or equal, EngineError
        when a question fails.
        """
        messages, media = one_message(prompt)
        self._media.prepare(media)
        template = closed_template(self.processor.config.thinking, chat_template_kwargs)
        asked = []
        for number, question in enumerate(questions):
            with blaming(f"questions[{number}]"):
                labels = label_ids(question, self.processor)
            turns = asked_behind(messages, question)
            found = self.processor.prompt(turns, [item.layout for item in media], template)
            check_closed(found, self.processor)
            asked.append(Asked(question, found, labels, found.in_order([item.patches for item in media])))
        with self._one_caller:
            return decide(asked, self._engine, self._stepper, self._request_ids)

    def _jobs(
        self,
        rows: Iterable[Any],
        read: Callable[[Any], Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None,
        on_text: OnText | None,
        template: Mapping[str, Any] | None,
        use: ToolUse | None,
    ) -> Iterator[_Job]:
        total = _length(rows)
        if params is None or isinstance(params, SamplingParams):
            params_of_each: Iterable[SamplingParams] = repeat(params or self.sampling_defaults)
        elif total == len(params):
            params_of_each = params
        else:
            shown = "an unknown number of" if total is None else total
            raise ValueError(f"there are {len(params)} params for {shown} prompts")
        each = enumerate(zip(rows, params_of_each, strict=False))
        return (
            _Job(number, row, read, self._with_tools(in_plain_shapes(sampling), use), on_text, template or {}, use)
            for number, (row, sampling) in each
        )

    def _with_tools(self, params: SamplingParams, use: ToolUse | None) -> SamplingParams:
        """UserError where the answer could not be told from calls."""
        form = None if use is None else self.processor.call_format
        if use is None or form is None:  # then the prompt is refused
            return params
        return replace(params, constraint=tool_constraint(use, form, params.constraint))

    def _answer(
        self, jobs: Iterator[_Job], total: int | None, errors: Errors, progress: bool | None
    ) -> list[Generation]:
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
        rows: deque[Row] = deque()  # given out from the left
        preparing: dict[Future[Ready], Row] = {}
        running: dict[str, tuple[Row, Answer]] = {}
        pool = ThreadPoolExecutor(PREPARE_THREADS, thread_name_prefix="siglane-prepare")
        try:
            while True:
                for job in islice(jobs, PREPARE_AHEAD - len(preparing)):
                    rows.append(Row(job.number, job.params, job.on_text))
                    preparing[pool.submit(self._prepare, job)] = rows[-1]
                if preparing and not self._engine.has_work:
                    wait(preparing, return_when=FIRST_COMPLETED)
                self._start_prepared(preparing, running)
                for delta in self._stepper.step() if self._engine.has_work else ():
                    self._take(delta, running)
                while rows and rows[0].done:
                    yield rows.popleft().generation()
                if not rows:
                    return
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for request_id in running:
                self._engine.abort(request_id)

    def _prepare(self, job: _Job) -> Ready:
        """Runs in a thread of the pool: everything between the caller's row and the engine."""
        facts = self.processor.config
        check_for_model(job.params, facts.language.vocab_size, facts.thinking)
        if job.params.constraint is not None:
            check_constraint(job.params.constraint)
        messages, media = job.read(job.row)
        self._media.prepare(media)
        tools = () if job.use is None else job.use.tools
        prompt = self.processor.prompt(messages, [item.layout for item in media], job.template, tools)
        images = prompt.in_order([item.patches for item in media])
        return Ready(prompt, images, tuple(map(report_image, media)), job.use)

    def _start_prepared(self, preparing: dict[Future[Ready], Row], running: dict[str, tuple[Row, Answer]]) -> None:
        """Hands prompts to the engine as it gets room, so that only a few wait with their images in memory."""
        for future in [future for future in preparing if future.done()]:
            if len(running) >= self._engine.config.max_running:
                return
            row = preparing.pop(future)
            try:
                self._start(row, future.result(), running)
            except Exception as error:
                row.error = blamed(error)

    def _start(self, row: Row, ready: Ready, running: dict[str, tuple[Row, Answer]]) -> None:
        prompt, params = ready.prompt, row.params
        row.images = ready.reports
        row.prompt_token_ids, row.image_tokens = prompt.token_ids, prompt.image_tokens
        room = max(1, self._engine.context_length - len(prompt.token_ids))  # the engine refuses prompts without room
        max_tokens = min(params.max_tokens or room, room)
        for index in range(params.n):
            request_id = next(self._request_ids)
            request = Request(request_id, prompt, params.choice(index), max_tokens, images=ready.images)
            self._engine.add(request)
            answer = Answer.of(request_id, prompt, params, self.processor, ready.use)
            running[request_id] = row, answer
            row.answers.append(answer)

    def _take(self, delta: TokenDelta, running: dict[str, tuple[Row, Answer]]) -> None:
        row, answer = running[delta.request_id]
        row.take(answer, delta)
        if answer.ended and answer.finished is None:
            aborted = self._engine.abort(delta.request_id)
            assert aborted is not None
            row.take(answer, aborted)
        if answer.finished is not None:
            del running[delta.request_id]


class Ready(NamedTuple):
    """A prompt that can be asked: its images in its order, what became of those that the caller named, and what may be
    done with the tools that it tells of."""

    prompt: Prompt
    images: tuple[ImagePatches, ...]
    reports: tuple[ImageReport, ...]
    use: ToolUse | None


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """One prompt as the caller gave it; `read` interprets it. template: variables of the chat template; use: of tools,
    where there are any."""

    number: int
    row: Any
    read: Callable[[Any], Conversation]
    params: SamplingParams
    on_text: OnText | None
    template: Mapping[str, Any]
    use: ToolUse | None


def _length(rows: Iterable[Any]) -> int | None:
    return len(rows) if isinstance(rows, Sequence) else None


def _engine_config(options: Mapping[str, Any]) -> EngineConfig:
    known = options_of(EngineConfig)
    names = {name: option.name for option in known for name in (option.name, option.alias) if name}
    for name in options:
        if name not in names:
            raise TypeError(f"LLM has no option {name!r}; it has {', '.join(option.name for option in known)}")
    return EngineConfig(**{names[name]: value for name, value in options.items()})
