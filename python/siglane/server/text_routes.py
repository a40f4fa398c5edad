"""The routes of a language model beside its chat: completions, decisions and scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel

from siglane.batch.row import COMPLETIONS, DECISIONS, SCORE, SYSTEMONE
from siglane.server.completion import CompletionStream, complete_texts, prepare_completion
from siglane.server.completion_protocol import Completion, CompletionRequest
from siglane.server.context import context_of
from siglane.server.decision_protocol import DecisionRequest
from siglane.server.decision_replies import DecisionReply, OpenaiDecision, SystemOneReply
from siglane.server.decisions import decide, decide_system_one
from siglane.server.errors import JsonResponse
from siglane.server.openapi import (
    OF_A_BODY,
    STREAM,
    completion_examples,
    decision_examples,
    failures,
    score_examples,
    system_one_examples,
)
from siglane.server.score import ScoreRequest, Scores, score
from siglane.server.served import ChatModel, Served
from siglane.server.systemone_protocol import SystemOneRequest

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
    answers: Responses = {200: {"model": Scores}, **failures(*OF_A_BODY)}

    @app.post(SCORE, responses=answers, response_model=None, openapi_extra=score_examples(model.name))
    async def create_score(body: ScoreRequest, request: Request) -> Any:
        headers = note_ignored(body)
        served.check_name(body.model, model)
        return JsonResponse(await score(body, context_of(request.scope), model), headers=headers)
