"""`LLM.decide`: questions about one prompt, answered from what the model would write first, by the engine's steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from siglane.engine.engine import Engine
from siglane.engine.sampling.labels import Ids, LabelRead, label_logprobs, label_reads
from siglane.errors import EngineError
from siglane.llm.stepper import Stepper
from siglane.types import Decision, ImagePatches, Prompt, Question, Readout, Request, SamplingParams


class Asked(NamedTuple):
    """A question that can be put. labels: their tokens; images: the prompt's, in its order."""

    question: Question
    prompt: Prompt
    labels: tuple[Ids, ...]
    images: tuple[ImagePatches, ...]


def decide(asked: Sequence[Asked], engine: Engine, stepper: Stepper, request_ids: Iterator[str]) -> list[Decision]:
    """Leaves the engine empty, however it ends. Raises the first error of a request."""
    reads = [label_reads(one.prompt, one.labels) for one in asked]
    waiting = deque((one, read) for one, several in zip(asked, reads, strict=True) for read in several)
    told: dict[LabelRead, list[Readout]] = {read: [] for several in reads for read in several}
    cached: dict[LabelRead, int] = {}
    running: dict[str, LabelRead] = {}
    try:
        while waiting or running:
            while waiting and len(running) < engine.config.max_running:
                one, read = waiting.popleft()
                request = Request(
                    next(request_ids), read.prompt, SamplingParams(), 0, images=one.images, reads=read.reads
                )
                engine.add(request)
                running[request.request_id] = read
            for delta in stepper.step():
                read = running[delta.request_id]
                told[read] += delta.readouts
                if delta.finished is not None:
                    del running[delta.request_id]
                    if delta.finished.reason == "error":
                        raise delta.finished.error or EngineError("the engine gave no reason")
                    cached[read] = delta.finished.cached_tokens
    finally:
        for request_id in running:
            engine.abort(request_id)
    return [
        Decision(
            one.question.meanings,
            label_logprobs(one.labels, [(read, told[read]) for read in several]),
            len(one.prompt.token_ids),
            min(len(one.prompt.token_ids), cached[several[0]]),
        )
        for one, several in zip(asked, reads, strict=True)
    ]
