"""POST /v1/completions: texts that are continued as they stand, without a chat template, and their probabilities."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from siglane.engine.answers.answer import Answer
from siglane.errors import UserError, blaming
from siglane.server.chat import Prepared, answered, resolve_max_tokens, sampling_of, too_long, whole_reply
from siglane.server.choices import ChoiceDelta, Choices, finish_reason
from siglane.server.completions.logprobs import Columns
from siglane.server.completions.protocol import (
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionChunkChoice,
    CompletionRequest,
)
from siglane.server.context import RequestContext
from siglane.server.served import ChatModel
from siglane.server.stream import EventStream
from siglane.server.tokens import ids_of
from siglane.types import Prompt, Read, Request

MAX_ECHOED = 1 << 20  # log-probabilities of prompts that one request is told


@dataclass(frozen=True, slots=True)
class GivenPrompt:
    """text: as an echo gives it."""

    text: str
    prompt: Prompt


async def prepare_completion(
    body: CompletionRequest, context: RequestContext, model: ChatModel
) -> tuple[Prepared, tuple[GivenPrompt, ...]]:
    """Everything before the engine. Raises UserError for a request that cannot be served."""
    sampling = sampling_of(body, model)
    if (asked := body.asked_constraint) is not None:
        with blaming(asked.param):
            await model.check_constraint(asked.constraint)
    salt, watch = context.client.salt(body.cache_salt), context.watch
    watch.start()
    given = await read_prompts(body, model)
    rooms = [resolve_max_tokens(body, sampling, one.prompt, model) for one in given]
    _check_echoed(body, given)
    watch.note("prepare")
    context.answer_id = request_id = f"cmpl-{secrets.token_hex(12)}"
    requests = [
        Request(
            f"{request_id}-{number * sampling.n + index}",
            one.prompt,
            sampling.choice(index),
            0 if body.max_tokens == 0 else room,
            salt,
            trace_id=context.request_id,
            batch=context.batch,
            reads=_reads(body, one.prompt),
            raw=True,
        )
        for number, (one, room) in enumerate(zip(given, rooms, strict=True))
        for index in range(sampling.n)
    ]
    prepared = Prepared(request_id, given[0].prompt, tuple(requests), [], watch.seconds, context.timings)
    return prepared, given


async def read_prompts(body: CompletionRequest, model: ChatModel) -> tuple[GivenPrompt, ...]:
    """The prompts as the model reads them: whoever sends one is its author, so special tokens written in it count.
    UserError for ids that the model does not have, and for placeholders, as no image comes with a completion."""
    prompts = body.prompts
    several = prompts is body.prompt
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if texts:
        lists = await ids_of(texts, body.add_special_tokens is not False, model)
    else:
        lists = [prompt for prompt in prompts if isinstance(prompt, list)]
        decode = model.processor.tokenizer.decode
    for number, ids in enumerate(lists):
        check_ids(ids, model, f"prompt[{number}]" if several else "prompt")
    if not texts:
        texts = [str(text) for text in await model.aside(lambda: [decode(ids) for ids in lists])]
    return tuple(GivenPrompt(text, Prompt(tuple(ids))) for text, ids in zip(texts, lists, strict=True))


def check_ids(ids: Sequence[int], model: ChatModel, param: str) -> None:
    facts = model.processor.config
    if not ids:
        raise UserError("the prompt has no tokens; give it at least one", code="empty_prompt", param=param)
    if len(ids) > model.context_length:
        raise too_long(len(ids), f"{len(ids)}", model, param)
    for name in () if facts.images is None else _placeholders(model):
        if name in ids:
            word = model.processor.tokenizer.decode([name])
            message = (
                f"the prompt has the placeholder {word!r} and no image comes with it; /v1/chat/completions reads them"
            )
            raise UserError(message, code="unsupported_content_type", param=param)
    if (largest := max(ids)) >= facts.language.vocab_size:
        message = f"the prompt has token {largest}; the model's ids are below {facts.language.vocab_size}"
        raise UserError(message, code="invalid_value", param=param)


def _placeholders(model: ChatModel) -> set[int]:
    facts = model.processor.config
    video = None if facts.images is None else facts.images.video
    known = model.processor.tokenizer.get_added_vocab()
    return {facts.image_token_id, *([known[video.token]] if video is not None and video.token in known else ())}


def _reads(body: CompletionRequest, prompt: Prompt) -> tuple[Read, ...]:
    if not body.echo or body.logprobs is None:
        return ()
    following = enumerate(prompt.token_ids[1:])
    return tuple(Read(position, (token_id,), body.logprobs) for position, token_id in following)


def _check_echoed(body: CompletionRequest, given: Sequence[GivenPrompt]) -> None:
    if not body.echo or body.logprobs is None:
        return
    told = sum(len(one.prompt.token_ids) for one in given) * (body.n or 1) * (body.logprobs + 1)
    if told > MAX_ECHOED:
        message = f"echo with logprobs would tell {told} log-probabilities; a request is told at most {MAX_ECHOED}"
        raise UserError(message, code="invalid_value", param="logprobs")


class Texts:
    """The texts and log-probabilities of a request's choices, as its client gets them."""

    def __init__(self, body: CompletionRequest, given: Sequence[GivenPrompt], model: ChatModel) -> None:
        self._body, self._given, self._model = body, given, model
        added = model.processor.tokenizer.added_tokens_decoder if body.logprobs is not None else {}
        self._hidden = {number for number, token in added.items() if token.special}

    def prompt_of(self, index: int) -> GivenPrompt:
        return self._given[index // (self._body.n or 1)]

    def beginning(self, index: int) -> str:
        """What a choice's text begins with."""
        return self.prompt_of(index).text if self._body.echo else ""

    def columns(self, index: int, answer: Answer) -> Columns | None:
        """Of a choice whose prompt has been read: the echoed prompt's."""
        if self._body.logprobs is None:
            return None
        columns, given = Columns(self._model.token_texts, self._hidden), self.prompt_of(index)
        if self._body.echo:
            columns.add_prompt(given.text, given.prompt.token_ids, answer.readouts)
        return columns


async def complete_texts(body: CompletionRequest, context: RequestContext, model: ChatModel) -> Completion:
    """All texts at once."""
    async with context.turn:
        prepared, given = await prepare_completion(body, context, model)
    choices = await answered(prepared, context, model)
    texts = Texts(body, given, model)
    told = [_choice(index, answer, texts) for index, answer in enumerate(choices.answers)]
    return {"object": "text_completion", "choices": told, **whole_reply(body, prepared, choices, model)}


def _choice(index: int, answer: Answer, texts: Texts) -> CompletionChoice:
    reason = finish_reason(answer)
    assert reason is not None
    columns = texts.columns(index, answer)
    if columns is not None:
        columns.add(answer.logprobs)
    return {
        "index": index,
        "text": texts.beginning(index) + answer.text,
        "logprobs": None if columns is None else columns.take(),
        "finish_reason": reason,
        "matched_stop": answer.matched_stop,
    }


class CompletionStream(EventStream):
    """The first event of a choice brings its echo."""

    def __init__(
        self, body: CompletionRequest, prepared: Prepared, given: Sequence[GivenPrompt], *rest: Any, **more: Any
    ) -> None:
        super().__init__(body, prepared, *rest, **more)
        self._texts = Texts(body, given, self._model)
        self._columns: dict[int, Columns | None] = {}

    def _says_something(self, delta: ChoiceDelta) -> bool:
        return bool(delta.text or delta.finish_reason or delta.logprob)

    def _chunk(self, delta: ChoiceDelta, choices: Choices) -> Any:
        text, answer = delta.text, choices.answers[delta.index]
        if delta.index not in self._columns:
            text = self._texts.beginning(delta.index) + text
            self._columns[delta.index] = self._texts.columns(delta.index, answer)
        columns = self._columns[delta.index]
        if columns is not None and delta.logprob is not None:
            columns.add([delta.logprob])
        choice: CompletionChunkChoice = {
            "index": delta.index,
            "text": text,
            "logprobs": None if columns is None else columns.take(),
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            choice["matched_stop"] = answer.matched_stop
        return self._with_report(self._frame([choice]), choices)

    def _frame(self, choices: list[CompletionChunkChoice]) -> CompletionChunk:
        return {**self._reply, "object": "text_completion", "choices": choices}


async def stream_texts(
    body: CompletionRequest, context: RequestContext, model: ChatModel, headers: Mapping[str, str]
) -> CompletionStream:
    """`complete_texts` as they come."""
    prepared, given = await prepare_completion(body, context, model)
    return CompletionStream(body, prepared, given, context, model, headers)
