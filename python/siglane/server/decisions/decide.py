"""POST /v1/decisions and /v1/systemone: typed questions answered by how likely each label is. No token is generated."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from siglane.engine.sampling.labels import check_closed, closed_template, label_ids
from siglane.errors import UserError, blaming
from siglane.families.pipeline import report_image
from siglane.families.prompt.questions import asked_behind
from siglane.media.messages import Conversation, url_item
from siglane.server.chat import (
    Prepared,
    answered,
    check_length,
    decode_media,
    input_usage,
    lay_out_media,
    siglane_report,
    usage_reply,
)
from siglane.server.context import RequestContext
from siglane.server.decisions.input import read_input
from siglane.server.decisions.labels import Put, check_size, decisions_of, requests_of, usage_of
from siglane.server.decisions.protocol import (
    DecisionRequest,
    Decisions,
    LevelsQuestion,
    PredicateQuestion,
    ValuesQuestion,
    checked,
    rendered,
)
from siglane.server.decisions.replies import (
    DecisionReply,
    OpenaiDecision,
    SystemOneReply,
    openai_answer,
    sglang_answer,
    system_one_answer,
)
from siglane.server.decisions.system_one import RatingQuestion, SystemOneRequest
from siglane.server.protocol import plain
from siglane.server.served import ChatModel
from siglane.types import Decision, ImagePart, Message, Question, Usage
from siglane.types.decision import FORMAT_VERSION


@dataclass(frozen=True, slots=True)
class Decided:
    """usage: of all questions' prompts, an image in each."""

    puts: list[Put]
    decisions: list[Decision]
    usage: Usage
    report: Any


async def decide(body: DecisionRequest, context: RequestContext, model: ChatModel) -> DecisionReply | OpenaiDecision:
    decided = await _decide(_about(body), checked(body.questions), body, context, model)
    pairs = list(zip(body.questions, decided.decisions, strict=True))
    if body.is_openai:
        kinds = (PredicateQuestion, ValuesQuestion, LevelsQuestion)
        return {
            "model": model.name,
            "answers": [
                openai_answer(one, decision, body.temperature) for one, decision in pairs if isinstance(one, kinds)
            ],
            "usage": input_usage(decided.usage),
            "siglane": decided.report,
        }
    answers = {}
    for (question, decision), put in zip(pairs, decided.puts, strict=True):
        assert not isinstance(question, PredicateQuestion | ValuesQuestion | LevelsQuestion)
        answer = answers[question.id] = sglang_answer(question.type, decision, body.temperature)
        if body.return_prompt_token_ids:
            answer["prompt_token_ids"] = list(put.prompt.token_ids)
            answer["label_token_ids"] = [list(ids) for ids in put.labels]
    return {
        "object": "decisions",
        "model": model.name,
        "prompt_format_version": FORMAT_VERSION,
        "answers": answers,
        "usage": usage_reply(decided.usage),
        "siglane": decided.report,
    }


async def decide_system_one(body: SystemOneRequest, context: RequestContext, model: ChatModel) -> SystemOneReply:
    asked = list(body.questions.values())
    decided = await _decide(_with_images(body, rendered(body.state)), checked(asked), body, context, model)
    levels = [question.criteria if isinstance(question, RatingQuestion) else () for question in asked]
    of_each = zip(body.questions.items(), levels, decided.decisions, strict=True)
    return {
        "model": model.name,
        "answers": {name: system_one_answer(one.type, levels, decision) for (name, one), levels, decision in of_each},
        "usage": input_usage(decided.usage),
        "siglane": decided.report,
    }


def _about(body: DecisionRequest) -> Conversation:
    if body.is_openai and isinstance(body.input, list):
        if body.images:
            message = "images stand in input, where that is a list of messages"
            raise UserError(message, code="invalid_value", param="images")
        return read_input(body.input)
    return _with_images(body, rendered(body.input))


def _with_images(body: Decisions, text: str) -> Conversation:
    """The images, then the text."""
    media = tuple(url_item(plain(image), f"images[{number}]") for number, image in enumerate(body.images or ()))
    return Conversation((Message("user", (*map(ImagePart, range(len(media))), text)),), media)


async def _decide(
    about: Conversation, questions: Sequence[Question], body: Decisions, context: RequestContext, model: ChatModel
) -> Decided:
    async with context.turn:
        prepared, puts = await _prepare(about, questions, body, context, model)
    choices = await answered(prepared, context, model)
    decisions = decisions_of(puts, choices)
    return Decided(puts, decisions, usage_of(puts, decisions), siglane_report(body, prepared, choices))


async def _prepare(
    about: Conversation, questions: Sequence[Question], body: Decisions, context: RequestContext, model: ChatModel
) -> tuple[Prepared, list[Put]]:
    """Everything before the engine; of the images only the headers are read before all prompts are known to fit."""
    salt, watch = context.client.salt(body.cache_salt), context.watch
    watch.start()
    try:
        await lay_out_media(about.messages, about.media, salt, context, model, watch)
    except UserError as error:  # of all of it together, a chat's messages are blamed
        raise (error.at(body.about_field) if error.param == "messages" else error) from None
    puts = [await _put(number, one, about, body.chat_template_kwargs, model) for number, one in enumerate(questions)]
    check_size(puts, "questions")
    await decode_media(about.media, salt, context, model)
    context.answer_id = request_id = f"decision-{secrets.token_hex(12)}"
    requests = requests_of(request_id, puts, [item.patches for item in about.media], salt, context)
    images = list(map(report_image, about.media))
    return Prepared(request_id, puts[0].prompt, requests, images, watch.seconds, context.timings), puts


async def _put(
    number: int, question: Question, about: Conversation, arguments: Mapping[str, Any] | None, model: ChatModel
) -> Put:
    processor, param = model.processor, f"questions[{number}]"
    turns = asked_behind(about.messages, question)
    with blaming(param):
        check_length(turns, (), model)
        labels = await model.aside(functools.partial(label_ids, question, processor))
    template = closed_template(processor.config.thinking, arguments)
    prompt = await model.prompt(turns, [item.layout for item in about.media], template)
    check_closed(prompt, processor)
    return Put.of(prompt, labels, question.meanings, model, param)
