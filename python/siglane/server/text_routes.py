"""Routes beside the chat: a language model's completions, decisions and scores, and the scores of two towers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel

from siglane.batch.row import COMPLETIONS, DECISIONS, PAIRS, SCORE, SYSTEMONE
from siglane.server.completions.complete import CompletionStream, complete_texts, prepare_completion
from siglane.server.completions.protocol import Completion, CompletionRequest
from siglane.server.context import context_of
from siglane.server.decisions.decide import decide, decide_system_one
from siglane.server.decisions.protocol import DecisionRequest
from siglane.server.decisions.replies import DecisionReply, OpenaiDecision, SystemOneReply
from siglane.server.decisions.score import ScoreRequest, Scores, score
from siglane.server.decisions.system_one import SystemOneRequest
from siglane.server.embedding.embed import score_pairs
from siglane.server.embedding.pairs import PairScores, PairsRequest
from siglane.server.errors import JsonResponse
from siglane.server.openapi import (
    OF_A_BODY,
    STREAM,
    completion_examples,
    decision_examples,
    failures,
    pair_examples,
    score_examples,
    system_one_examples,
)
from siglane.server.served import ChatModel, EmbedModel, Served

NoteIgnored = Callable[[BaseModel], dict[str, str]]
Responses = dict[int | str, dict[str, Any]]


def add_completions(app: FastAPI, served: Served, model: ChatModel, note_ignored: NoteIgnored) -> None:
    answers: Responses = {200: {"model": Completion, "content": STREAM}, **failures(*OF_A_BODY)}
    shown = completion_examples(model.name)

    @app.post(COMPLETIONS, responses=answers, response_model=None, openapi_extra=shown)
    async def create_completion(body: CompletionRequest, request: Request) -> Any:
        context = context_of(request.scope)
        headers: Mapping[str, str] = note_ignored(body)
        served.check_name(body.model, model)
        if not body.stream:
            return JsonResponse(await complete_texts(body, context, model), headers=headers)
        prepared, given = await prepare_completion(body, context, model)
        return CompletionStream(body, prepared, given, context, model, headers)


def add_decisions(app: FastAPI, served: Served, model: ChatModel, note_ignored: NoteIgnored) -> None:
    sees = model.processor.config.images is not None
    answers: Responses = {200: {"model": DecisionReply | OpenaiDecision}, **failures(*OF_A_BODY)}
    of_system_one: Responses = {200: {"model": SystemOneReply}, **failures(*OF_A_BODY)}

    @app.post(DECISIONS, responses=answers, response_model=None, openapi_extra=decision_examples(model.name, sees))
    async def create_decision(body: DecisionRequest, request: Request) -> Any:
        headers = note_ignored(body)
        served.check_name(body.model, model)
        return JsonResponse(await decide(body, context_of(request.scope), model), headers=headers)

    shown = system_one_examples(model.name, sees)

    @app.post(SYSTEMONE, responses=of_system_one, response_model=None, openapi_extra=shown)
    async def create_system_one_decision(body: SystemOneRequest, request: Request) -> Any:
        headers = note_ignored(body)
        served.check_name(body.model, model)
        return JsonResponse(await decide_system_one(body, context_of(request.scope), model), headers=headers)


def add_scores(app: FastAPI, served: Served, model: ChatModel, note_ignored: NoteIgnored) -> None:
    """A language model's at SGLang's path; at vLLM's only without a model that embeds."""
    answers: Responses = {200: {"model": Scores}, **failures(*OF_A_BODY)}

    async def create_score(body: ScoreRequest, request: Request) -> Any:
        headers = note_ignored(body)
        served.check_name(body.model, model)
        return JsonResponse(await score(body, context_of(request.scope), model), headers=headers)

    for path in (SCORE, *((PAIRS,) if served.embed is None else ())):
        add_post(app, path, create_score, answers, score_examples(model.name), shown=path == SCORE)


def add_pairs(app: FastAPI, served: Served, model: EmbedModel, note_ignored: NoteIgnored) -> None:
    """Two towers' at vLLM's path, and at SGLang's without a language model."""
    answers: Responses = {200: {"model": PairScores}, **failures(*OF_A_BODY)}

    async def create_pair_scores(body: PairsRequest, request: Request) -> Any:
        headers = note_ignored(body)
        served.check_name(body.model, model)
        return JsonResponse(await score_pairs(body, context_of(request.scope), model), headers=headers)

    for path in (PAIRS, *((SCORE,) if served.chat is None else ())):
        add_post(app, path, create_pair_scores, answers, pair_examples(model.name), shown=path == PAIRS)


def add_post(
    app: FastAPI, path: str, route: Callable[..., Any], answers: Responses, examples: dict[str, Any], *, shown: bool
) -> None:
    """shown: in the OpenAPI document."""
    app.add_api_route(
        path,
        route,
        methods=["POST"],
        responses=answers,
        response_model=None,
        openapi_extra=examples,
        include_in_schema=shown,
    )
