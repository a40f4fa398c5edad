"""POST /v1/chat/completions: from messages to a request of the engine, and its answer in one piece."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from siglane.engine.answers.answer import Answer
from siglane.engine.sampling.parameters import check_for_model
from siglane.errors import UserError, blaming
from siglane.families.pipeline import report_image
from siglane.families.report import ImageReport
from siglane.media.item import MediaItem
from siglane.media.messages import read_messages
from siglane.server.choices import ChoiceDelta, Choices, finish_reason
from siglane.server.context import RequestContext
from siglane.server.protocol import AnyMessage, ChatCompletionRequest, GenerationRequest, plain
from siglane.server.replies import (
    ChatCompletion,
    Choice,
    InputUsage,
    ReplyMessage,
    ReplyPiece,
    SiglaneReport,
    UsageReply,
    WholeReply,
)
from siglane.server.served import ChatModel
from siglane.server.stopwatch import Stopwatch
from siglane.server.tool_fields import call_replies, with_tools
from siglane.types import Message, Prompt, Request, SamplingParams, Tool, ToolUse, Usage


class Reported(Protocol):
    """A request of any kind, in what its report depends on."""

    @property
    def include_timings(self) -> bool | None: ...


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that can run. tool_use: what its answer may call; seconds: of its stages so far; timings: whether a
    header asks for them."""

    request_id: str
    prompt: Prompt
    requests: tuple[Request, ...]
    images: list[ImageReport]
    seconds: dict[str, float]
    timings: bool = False
    tool_use: ToolUse | None = None


async def prepare(body: ChatCompletionRequest, context: RequestContext, model: ChatModel) -> Prepared:
    """Everything before the engine. Raises UserError for a request that cannot be served, cheapest checks first."""
    sampling, asked, use = sampling_of(body, model), body.asked_constraint, body.tool_use
    if use is not None and (form := await model.call_format()) is not None:
        asked = with_tools(use, form, asked)
        sampling = replace(sampling, constraint=None if asked is None else asked.constraint)
    if asked is not None:
        with blaming(asked.param, blame_if_none_is):
            await model.check_constraint(asked.constraint)
    salt, watch = context.client.salt(body.cache_salt), context.watch
    watch.start()
    tools = () if use is None else use.tools
    prompt, media = await lay_out_prompt(body.messages, body.chat_template_kwargs, salt, context, model, watch, tools)
    # of the images only the headers were read so far: what is too long is never decoded
    max_tokens = resolve_max_tokens(body, sampling, prompt, model)
    await decode_media(media, salt, context, model)
    images = prompt.in_order([item.patches for item in media])
    prompt = prompt.settled(images)
    context.answer_id = request_id = f"chatcmpl-{secrets.token_hex(12)}"
    requests = tuple(
        Request(
            f"{request_id}-{index}",
            prompt,
            sampling.choice(index),
            max_tokens,
            salt,
            images,
            context.request_id,
            context.batch,
        )
        for index in range(sampling.n)
    )
    reports = list(map(report_image, media))
    return Prepared(request_id, prompt, requests, reports, watch.seconds, context.timings, use)


def blame_if_none_is(error: UserError, param: str) -> UserError:
    return error if error.param else error.at(param)


async def lay_out_prompt(
    messages: Sequence[AnyMessage],
    arguments: Mapping[str, Any] | None,
    salt: str,
    context: RequestContext,
    model: ChatModel,
    watch: Stopwatch,
    tools: Sequence[Tool] = (),
) -> tuple[Prompt, Sequence[MediaItem]]:
    """The prompt of a conversation, and its media, of which only the headers were read. arguments: of the template."""
    turns, media = read_messages(plain(list(messages)))
    await lay_out_media(turns, media, salt, context, model, watch, tools)
    return await model.prompt(turns, [item.layout for item in media], arguments, tools), media


async def lay_out_media(
    turns: Sequence[Message],
    media: Sequence[MediaItem],
    salt: str,
    context: RequestContext,
    model: ChatModel,
    watch: Stopwatch,
    tools: Sequence[Tool] = (),
) -> None:
    """Fetches what a conversation that may fit refers to, and reads the headers."""
    model.media.admit(media)
    check_length(turns, tools, model)
    await model.media.fetch(media, salt, context.lease)
    watch.note("fetch")
    await model.media.lay_out(media)


async def decode_media(media: Sequence[MediaItem], salt: str, context: RequestContext, model: ChatModel) -> None:
    """Media that were laid out become patches, which settle their layouts. RateLimited where the client has had its
    share of them."""
    context.client.take_patches(sum(item.layout.patches for item in media), context.batch)
    context.watch.note("prepare")
    await model.media.preprocess(media, salt, context.lease)
    decoding, cutting = sum(item.decoding for item in media), sum(item.cutting for item in media)
    context.watch.share({"decode": decoding, "prepare": cutting})


def check_length(messages: Sequence[Message], tools: Sequence[Tool], model: ChatModel) -> None:
    """Refuses text that cannot fit before it is tokenised: no token stands for more than the longest one's letters."""
    characters = sum(message.characters for message in messages) + sum(tool.characters for tool in tools)
    least = characters // model.longest_token
    if least >= model.context_length:
        raise too_long(least, f"at least {least}", model)


def too_long(tokens: int, shown: str, model: ChatModel, param: str = "messages") -> UserError:
    message = f"the prompt has {shown} tokens; the model reads at most {model.context_length}"
    return UserError(message, code="context_length_exceeded", param=param)


def resolve_max_tokens(body: GenerationRequest, sampling: SamplingParams, prompt: Prompt, model: ChatModel) -> int:
    """The client's bound when there is room for it; where it names none the checkpoint's, or all the room."""
    length, longest = len(prompt.token_ids), model.context_length
    room = longest - length
    if room < 1:
        raise too_long(length, f"{length} ({prompt.image_tokens} of them for images)", model, body.prompt_field)
    wanted = body.requested_tokens
    if wanted is not None and wanted > room:
        raise UserError(
            f"the prompt has {length} tokens ({prompt.image_tokens} of them for images) and {wanted} are to be "
            f"generated; the context holds {longest}",
            code="context_length_exceeded",
            param=body.tokens_field,
        )
    max_tokens = min(sampling.max_tokens or room, room)
    if sampling.min_tokens > max_tokens:
        raise UserError(f"min_tokens is more than the {max_tokens} allowed", code="invalid_value", param="min_tokens")
    return max_tokens


def sampling_of(body: GenerationRequest, model: ChatModel) -> SamplingParams:
    """What the client names, and the server's defaults for the rest."""
    sampling = replace(model.sampling_defaults, **body.sampling)
    language = model.processor.config.language
    check_for_model(sampling, language.vocab_size, model.processor.config.thinking)
    return sampling


async def complete(body: ChatCompletionRequest, context: RequestContext, model: ChatModel) -> ChatCompletion:
    """The whole answer at once."""
    async with context.turn:
        prepared = await prepare(body, context, model)
    choices = await answered(prepared, context, model)
    told = [choice_reply(index, answer, model) for index, answer in enumerate(choices.answers)]
    return {"object": "chat.completion", "choices": told, **whole_reply(body, prepared, choices, model)}


async def answered(
    prepared: Prepared, context: RequestContext, model: ChatModel, take: Callable[[ChoiceDelta], object] | None = None
) -> Choices:
    """Once they have ended. take: called with what becomes known of them."""
    async with context.place:
        context.admit()
        choices = await model.ask(prepared.requests, prepared.tool_use)
    try:
        while not choices.finished:
            delta = await choices.next()
            if take is not None and delta is not None:
                take(delta)
    finally:
        model.release(choices)
    note_answer(choices, prepared, context, model)
    return choices


def reply_of(prepared: Prepared, model: ChatModel, created: int) -> ReplyPiece:
    """What an answer and all its pieces have. created: seconds since 1970."""
    return {"id": prepared.request_id, "created": created, "model": model.name, "system_fingerprint": model.fingerprint}


def whole_reply(body: Reported, prepared: Prepared, choices: Choices, model: ChatModel) -> WholeReply:
    """All but what its choices say."""
    return {
        **reply_of(prepared, model, int(time.time())),
        "usage": usage_reply(choices.usage),
        "siglane": siglane_report(body, prepared, choices),
    }


def choice_reply(index: int, answer: Answer, model: ChatModel) -> Choice:
    reason = finish_reason(answer)
    assert reason is not None
    return {
        "index": index,
        "message": assistant_message(answer, model),
        "logprobs": model.token_texts.report(answer.logprobs) if answer.logprobs else None,
        "finish_reason": reason,
        "matched_stop": answer.matched_stop,
    }


def assistant_message(answer: Answer, model: ChatModel) -> ReplyMessage:
    calls = answer.calls
    message: ReplyMessage = {"role": "assistant", "content": answer.text, "refusal": None}
    if calls:
        message["content"] = answer.text or None
        message["tool_calls"] = call_replies(calls)
    if model.processor.config.thinking is not None:
        message["reasoning_content"] = answer.reasoning or None
    return message


def usage_reply(usage: Usage) -> UsageReply:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "image_tokens": usage.image_tokens,
            "text_tokens": usage.text_tokens,
        },
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "accepted_prediction_tokens": usage.accepted_prediction_tokens,
            "rejected_prediction_tokens": usage.rejected_prediction_tokens,
        },
    }


def input_usage(usage: Usage) -> InputUsage:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }


def siglane_report(body: Reported, prepared: Prepared, choices: Choices) -> SiglaneReport:
    report: SiglaneReport = {"images": prepared.images}
    if body.include_timings or prepared.timings:
        report["timings"] = {stage: round(value, 6) for stage, value in {**prepared.seconds, **choices.stages}.items()}
    return report


def note_answer(choices: Choices, prepared: Prepared, context: RequestContext, model: ChatModel) -> None:
    """Counts an answer that was given in full."""
    usage, metrics = choices.usage, model.metrics
    context.watch.follow(choices.stages, choices.asked)
    metrics.count_tokens(
        prompt=usage.prompt_tokens,
        cached=usage.cached_tokens,
        image=usage.image_tokens,
        completion=usage.completion_tokens,
    )
    metrics.images.inc(len(prepared.images))
    metrics.observe_stages({**prepared.seconds, **choices.stages})
    if choices.first_token is not None and not context.batch:  # nobody waits for a batch's
        metrics.first_token.observe(choices.first_token - context.began)
