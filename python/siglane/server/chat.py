"""POST /v1/chat/completions: from messages to a request of the engine, and its answer in one piece."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from siglane.engine.thinking import check_thinking_budget
from siglane.errors import UserError
from siglane.families.pipeline import report_image
from siglane.families.report import ImageReport
from siglane.media.item import MediaItem
from siglane.server.answer import Answer
from siglane.server.context import RequestContext
from siglane.server.protocol import (
    AssistantMessage,
    ChatCompletion,
    ChatCompletionRequest,
    ChatMessage,
    Choice,
    FinishReason,
    ImageUrlPart,
    SiglaneReport,
    UsageReply,
    VideoUrlPart,
)
from siglane.server.state import ServerState
from siglane.server.stopwatch import Stopwatch
from siglane.types import ImagePart, Message, Prompt, Request, Role, SamplingParams, TokenLogprob, Usage

LEAST_TEMPERATURE = 1e-4  # below it dividing float32 logits overflows; the likeliest token is taken instead


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that can run. seconds: of its stages so far."""

    request_id: str
    prompt: Prompt
    requests: tuple[Request, ...]
    images: list[ImageReport]
    seconds: dict[str, float]


async def prepare(body: ChatCompletionRequest, context: RequestContext, state: ServerState) -> Prepared:
    """Everything before the engine. Raises UserError for a request that cannot be served, cheapest checks first."""
    state.check_model(body.model)
    messages, items = read_messages(body.messages)
    state.media.admit(items)
    sampling = sampling_of(body, state)
    check_length(messages, state)
    salt = body.cache_salt or ""
    watch = Stopwatch()
    await state.media.fetch(items, salt, context.lease)
    watch.note("fetch")
    await state.media.lay_out(items)
    # of the images only the headers were read so far: what is too long is never decoded
    layouts = [item.layout for item in items]
    prompt = await state.media.run(state.processor.prompt, messages, layouts, body.chat_template_kwargs)
    max_tokens = resolve_max_tokens(body, prompt, state)
    watch.note("prepare")
    await state.media.preprocess(items, context.lease)
    watch.add("decode", sum(item.decoding for item in items))
    watch.add("prepare", sum(item.cutting for item in items))
    images = prompt.in_order([item.patches for item in items])
    request_id = f"chatcmpl-{secrets.token_hex(12)}"
    requests = tuple(
        Request(f"{request_id}-{index}", prompt, _nth(sampling, index), max_tokens, salt, images)
        for index in range(sampling.n)
    )
    return Prepared(request_id, prompt, requests, list(map(report_image, items)), watch.seconds)


def read_messages(messages: Sequence[ChatMessage]) -> tuple[tuple[Message, ...], list[MediaItem]]:
    """The conversation with its pictures and videos numbered, and what each is."""
    items: list[MediaItem] = []
    read: list[Message] = []
    for i, message in enumerate(messages):
        parts: list[str | ImagePart] = []
        for j, part in enumerate([message.content] if isinstance(message.content, str) else message.content):
            if isinstance(part, str):
                parts.append(part)
            elif isinstance(part, ImageUrlPart):
                parts.append(ImagePart(len(items)))
                items.append(MediaItem(part.image_url.url, f"messages[{i}].content[{j}]", part.image_url.image_limits))
            elif isinstance(part, VideoUrlPart):
                asked, param = part.video_url, f"messages[{i}].content[{j}]"
                parts.append(ImagePart(len(items)))
                items.append(MediaItem(asked.url, param, asked.image_limits, video=True, frames=asked.num_frames))
            else:
                parts.append(part.text)
        role: Role = "system" if message.role == "developer" else message.role
        read.append(Message(role, tuple(parts)))
    return tuple(read), items


def check_length(messages: Sequence[Message], state: ServerState) -> None:
    """Refuses text that cannot fit before it is tokenised: no token stands for more than the longest one's letters."""
    letters = sum(len(part) for message in messages for part in message.parts if isinstance(part, str))
    least = letters // state.longest_token
    if least >= state.processor.context_length:
        raise too_long(least, f"at least {least}", state)


def too_long(tokens: int, shown: str, state: ServerState) -> UserError:
    message = f"the prompt has {shown} tokens; the model reads at most {state.processor.context_length}"
    return UserError(message, code="context_length_exceeded", param="messages")


def resolve_max_tokens(body: ChatCompletionRequest, prompt: Prompt, state: ServerState) -> int:
    """The client's bound when there is room for it, all the room when it names none."""
    length, longest = len(prompt.token_ids), state.processor.context_length
    room = longest - length
    if room < 1:
        raise too_long(length, f"{length} ({prompt.image_tokens} of them for images)", state)
    wanted = body.requested_tokens
    if wanted is not None and wanted > room:
        raise UserError(
            f"the prompt has {length} tokens ({prompt.image_tokens} of them for images) and {wanted} are to be "
            f"generated; the context holds {longest}",
            code="context_length_exceeded",
            param="max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens",
        )
    max_tokens = room if wanted is None else wanted
    if (body.min_tokens or 0) > max_tokens:
        raise UserError(f"min_tokens is more than the {max_tokens} allowed", code="invalid_value", param="min_tokens")
    return max_tokens


def sampling_of(body: ChatCompletionRequest, state: ServerState) -> SamplingParams:
    vocabulary = state.processor.config.language.vocab_size
    bias = tuple((int(key), float(value)) for key, value in (body.logit_bias or {}).items())
    _check_ids("logit_bias", (token_id for token_id, _ in bias), vocabulary)
    _check_ids("stop_token_ids", body.stop_token_ids or (), vocabulary)
    temperature = state.config.default_temperature if body.temperature is None else body.temperature
    sampling = SamplingParams(
        temperature=temperature if temperature >= LEAST_TEMPERATURE else 0.0,
        top_k=max(0, body.top_k or 0),  # -1 and 0 both mean no limit
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logit_bias=bias,
        seed=body.seed,
        stop=body.stops,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        min_tokens=body.min_tokens or 0,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        n=body.choices,
        thinking_budget=body.most_thinking,
    )
    check_thinking_budget(sampling, state.processor.config.thinking)
    return sampling


def _check_ids(param: str, ids: Iterable[int], vocabulary: int) -> None:
    for token_id in ids:
        if token_id >= vocabulary:
            message = f"{param} names token {token_id}; the vocabulary ends at {vocabulary - 1}"
            raise UserError(message, code="invalid_value", param=param)


def _nth(sampling: SamplingParams, index: int) -> SamplingParams:
    """Choice number `index`: with a seed, every choice has its own and repeats."""
    seed = sampling.seed
    return replace(sampling, n=1, seed=None if seed is None else (seed + index) % (1 << 63))


async def complete(body: ChatCompletionRequest, context: RequestContext, state: ServerState) -> ChatCompletion:
    """The whole answer at once."""
    prepared = await prepare(body, context, state)
    answer = await state.ask(prepared.requests)
    texts = ["" for _ in prepared.requests]
    reasonings = ["" for _ in prepared.requests]
    logprobs: list[list[TokenLogprob]] = [[] for _ in prepared.requests]
    endings: dict[int, tuple[FinishReason, str | int | None]] = {}
    try:
        while not answer.finished:
            piece = await answer.next()
            assert piece is not None
            texts[piece.index] += piece.text
            reasonings[piece.index] += piece.reasoning
            logprobs[piece.index] += piece.logprobs
            if piece.finish_reason is not None:
                endings[piece.index] = (piece.finish_reason, piece.matched_stop)
    finally:
        state.release(answer)
    note_answer(answer, prepared, context, state)
    choices: list[Choice] = [
        {
            "index": index,
            "message": assistant_message(texts[index], reasonings[index], state),
            "logprobs": state.token_texts.report(logprobs[index]) if body.logprobs else None,
            "finish_reason": endings[index][0],
            "matched_stop": endings[index][1],
        }
        for index in range(len(prepared.requests))
    ]
    return {
        "id": prepared.request_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": state.name,
        "system_fingerprint": state.fingerprint,
        "choices": choices,
        "usage": usage_reply(answer.usage),
        "siglane": siglane_report(body, prepared, answer),
    }


def assistant_message(text: str, reasoning: str, state: ServerState) -> AssistantMessage:
    message: AssistantMessage = {"role": "assistant", "content": text, "refusal": None}
    if state.processor.config.thinking is not None:
        message["reasoning_content"] = reasoning or None
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
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def siglane_report(body: ChatCompletionRequest, prepared: Prepared, answer: Answer) -> SiglaneReport:
    report: SiglaneReport = {"images": prepared.images}
    if body.include_timings:
        report["timings"] = {stage: round(value, 6) for stage, value in {**prepared.seconds, **answer.stages}.items()}
    return report


def note_answer(answer: Answer, prepared: Prepared, context: RequestContext, state: ServerState) -> None:
    """Counts an answer that was given in full."""
    usage, metrics = answer.usage, state.metrics
    metrics.count_tokens(
        prompt=usage.prompt_tokens,
        cached=usage.cached_tokens,
        image=usage.image_tokens,
        completion=usage.completion_tokens,
    )
    metrics.images.inc(len(prepared.images))
    metrics.observe_stages({**prepared.seconds, **answer.stages})
    if answer.first_token is not None:
        metrics.first_token.observe(answer.first_token - context.began)
