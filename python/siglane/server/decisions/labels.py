"""Labels behind prompts, as requests of the engine: what decisions and scores are made of."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from siglane.engine.sampling.labels import Ids, LabelRead, label_logprobs, label_reads
from siglane.errors import UserError
from siglane.server.chat import too_long
from siglane.server.choices import Choices, finish_reason
from siglane.server.context import RequestContext
from siglane.server.served import ChatModel
from siglane.types import Decision, ImagePatches, Prompt, Request, SamplingParams, Usage

MAX_READS = 256  # requests of the engine that one client's becomes
MAX_TOKENS = 1 << 18  # of all their prompts


class Put(NamedTuple):
    """A question as the model reads it. labels: their tokens; names: what they stand for; reads: the requests that find
    them."""

    prompt: Prompt
    labels: tuple[Ids, ...]
    names: tuple[str, ...]
    reads: list[LabelRead]

    @classmethod
    def of(cls, prompt: Prompt, labels: tuple[Ids, ...], names: tuple[str, ...], model: ChatModel, param: str) -> Put:
        """UserError, of `param`, where prompt and labels do not fit."""
        reads = label_reads(prompt, labels)
        longest = max(len(read.prompt.token_ids) for read in reads)
        if longest > model.context_length:
            raise too_long(longest, f"{longest} ({prompt.image_tokens} of them for images)", model, param)
        return cls(prompt, labels, names, reads)


def check_size(puts: Sequence[Put], param: str) -> None:
    """UserError for more than one client may ask at a time."""
    reads = [read for put in puts for read in put.reads]
    if len(reads) > MAX_READS:
        message = f"the labels begin in {len(reads)} ways; at most {MAX_READS} are read in a request, send several"
        raise UserError(message, code="invalid_value", param=param)
    tokens = sum(len(read.prompt.token_ids) for read in reads)
    if tokens > MAX_TOKENS:
        message = f"all prompts and labels together have {tokens} tokens; at most {MAX_TOKENS} are read in a request"
        raise UserError(message, code="invalid_value", param=param)


def requests_of(
    request_id: str, puts: Sequence[Put], patches: Sequence[ImagePatches], salt: str, context: RequestContext
) -> tuple[Request, ...]:
    """patches: of the images, in the order of the messages."""
    numbers = itertools.count()
    return tuple(
        Request(
            f"{request_id}-{next(numbers)}",
            read.prompt,
            SamplingParams(),
            0,
            salt,
            put.prompt.in_order(patches),
            context.request_id,
            context.batch,
            read.reads,
            raw=True,
        )
        for put in puts
        for read in put.reads
    )


def decisions_of(puts: Sequence[Put], choices: Choices) -> list[Decision]:
    """Raises what ended a request early."""
    answers = iter(choices.answers)
    decisions = []
    for put in puts:
        found = list(itertools.islice(answers, len(put.reads)))
        for answer in found:
            finish_reason(answer)
        told = [(read, answer.readouts) for read, answer in zip(put.reads, found, strict=True)]
        length, cached = len(put.prompt.token_ids), found[0].usage.cached_tokens
        logprobs = label_logprobs(put.labels, told)
        decisions.append(Decision(put.names, logprobs, length, min(length, cached)))
    return decisions


def usage_of(puts: Sequence[Put], decisions: Sequence[Decision]) -> Usage:
    """Of all prompts, an image in each."""
    return Usage(
        prompt_tokens=sum(one.prompt_tokens for one in decisions),
        completion_tokens=0,
        cached_tokens=sum(one.cached_tokens for one in decisions),
        image_tokens=sum(put.prompt.image_tokens for put in puts),
    )
