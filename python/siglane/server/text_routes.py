"""The routes of a language model beside its chat: completions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel

from siglane.batch.row import COMPLETIONS
from siglane.server.completion import CompletionStream, complete_texts, prepare_completion
from siglane.server.completion_protocol import Completion, CompletionRequest
from siglane.server.context import context_of
from siglane.server.errors import JsonResponse
from siglane.server.openapi import OF_A_BODY, STREAM, completion_examples, failures
from siglane.server.served import ChatModel, Served

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
