"""How likely labels are behind a prompt: the sum of their tokens' log-probabilities, from as few forwards as it takes.

The tokens of a label are appended to those of the prompt. The labels of a question are a tree; what follows each of
its inner places is read once, on as many requests as the tree has paths to its last inner places: one where every
label is one token. They and other questions about the same images share what the prefix cache holds of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from siglane.config.vlm import Thinking
from siglane.engine.answers.thinking import thinking_start
from siglane.errors import UserError
from siglane.families.processor import Processor
from siglane.types import Prompt, Question, Read, Readout

MOST_LABELS = 255  # as System One has it
MOST_LABEL_TOKENS, MOST_LABEL_LETTERS = 64, 4096
Ids = tuple[int, ...]


class LabelRead(NamedTuple):
    """A request that reads a path of the tree. tail: the tokens behind the prompt, in `prompt` already; reads: at its
    places that no other one reads."""

    prompt: Prompt
    tail: Ids
    reads: tuple[Read, ...]


def label_ids(question: Question, processor: Processor) -> tuple[Ids, ...]:
    """The tokens of each label, whose text is never a special token. UserError for labels that are empty, equal, too
    many or too long."""
    if not 1 <= len(question.labels) <= MOST_LABELS:
        message = f"a question has between 1 and {MOST_LABELS} labels, this one has {len(question.labels)}"
        raise UserError(message, code="invalid_value", param="labels")
    found: dict[Ids, str] = {}
    for number, label in enumerate(question.labels):
        param = f"labels[{number}]"
        if len(label) > MOST_LABEL_LETTERS:
            message = f"a label has at most {MOST_LABEL_LETTERS} letters, this one has {len(label)}"
            raise UserError(message, code="invalid_value", param=param)
        ids = processor.text_ids(label)
        if not ids:
            raise UserError("a label must not be empty", code="invalid_value", param=param)
        if ids in found:
            message = f"the label {label[:40]!r} is the same as {found[ids][:40]!r}"
            raise UserError(message, code="invalid_value", param=param)
        if len(ids) > MOST_LABEL_TOKENS:
            message = f"a label has at most {MOST_LABEL_TOKENS} tokens, this one has {len(ids)}"
            raise UserError(message, code="invalid_value", param=param)
        found[ids] = label
    return tuple(found)


def closed_template(thinking: Thinking | None, arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of a chat template that leaves no room for thinking before the answer."""
    return {**({} if thinking is None else {"enable_thinking": False}), **(arguments or {})}


def check_closed(prompt: Prompt, processor: Processor) -> None:
    """UserError where the model would think before it answers: labels behind the prompt would be no answers."""
    thinking = processor.config.thinking
    if thinking is not None and thinking_start(prompt.token_ids, thinking, processor.eos_token_ids) != "closed":
        message = "the chat template leaves room for thinking before the answer; leave enable_thinking out or false"
        raise UserError(message, code="invalid_value", param="chat_template_kwargs")


def label_reads(prompt: Prompt, labels: Sequence[Ids]) -> list[LabelRead]:
    """The requests that read all `labels` behind `prompt`."""
    following: dict[Ids, dict[int, None]] = {}  # of each inner place, which tokens
    for ids in labels:
        for length, token_id in enumerate(ids):
            following.setdefault(ids[:length], {})[token_id] = None
    passed = {place[:length] for place in following for length in range(len(place))}
    end, unread = len(prompt.token_ids) - 1, set(following)
    found = []
    for tail in following:
        if tail in passed:
            continue
        places = [tail[:length] for length in range(len(tail) + 1) if tail[:length] in unread]
        unread -= {*places}
        reads = tuple(Read(end + len(place), tuple(following[place])) for place in places)
        found.append(LabelRead(extended(prompt, tail), tail, reads))
    return found


def extended(prompt: Prompt, tail: Ids) -> Prompt:
    return dataclasses.replace(prompt, token_ids=prompt.token_ids + tail)


def label_logprobs(labels: Sequence[Ids], told: Sequence[tuple[LabelRead, Sequence[Readout]]]) -> tuple[float, ...]:
    """Of each label. told: of every request of `label_reads`, what it found."""
    known: Mapping[tuple[Ids, int], float] = {
        (one.tail[: len(one.tail) - len(one.prompt.token_ids) + 1 + read.position], token_id): logprob
        for one, readouts in told
        for read, readout in zip(one.reads, readouts, strict=True)
        for token_id, logprob in zip(read.token_ids, readout.logprobs, strict=True)
    }
    return tuple(math.fsum(known[ids[:length], ids[length]] for length in range(len(ids))) for ids in labels)
