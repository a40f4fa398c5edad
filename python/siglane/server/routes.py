"""The routes that ask a model: a language model's chats, completions, decisions, scores and tokens, and what two towers
say of texts and images."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.responses import Response

from siglane.batch.row import CHAT, CLASSIFY, COMPLETIONS, DECISIONS, EMBEDDINGS, PAIRS, SCORE, SYSTEMONE
from siglane.server.chat import complete
from siglane.server.completions.complete import complete_texts, stream_texts
from siglane.server.completions.protocol import Completion, CompletionRequest
from siglane.server.context import RequestContext, context_of
from siglane.server.decisions.decide import decide, decide_system_one
from siglane.server.decisions.protocol import DecisionRequest
from siglane.server.decisions.replies import DecisionReply, OpenaiDecision, SystemOneReply
from siglane.server.decisions.score import ScoreRequest, Scores, score
from siglane.server.decisions.system_one import SystemOneRequest
from siglane.server.embedding.embed import classify, embed, score_pairs
from siglane.server.embedding.pairs import PairScores, PairsRequest
from siglane.server.embedding.protocol import ClassificationList, ClassificationRequest, EmbeddingList, EmbeddingRequest
from siglane.server.errors import ErrorBody, JsonResponse
from siglane.server.openapi import (
    OF_A_BODY,
    STREAM,
    chat_examples,
    classification_examples,
    completion_examples,
    decision_examples,
    embedding_examples,
    failures,
    pair_examples,
    score_examples,
    system_one_examples,
)
from siglane.server.protocol import ChatCompletionRequest, ignored_fields
from siglane.server.replies import ChatCompletion
from siglane.server.served import ChatModel, EmbedModel, Served, ServedModel
from siglane.server.stream import stream_chat
from siglane.server.tokens import (
    DetokenizedText,
    DetokenizeRequest,
    ImageTokens,
    ImageTokensRequest,
    TokenizeRequest,
    TokenList,
    detokenize,
    image_tokens,
    tokenize,
)

logger = logging.getLogger(__name__)

IGNORED_FIELDS = "x-siglane-ignored-fields"
MOST_WARNINGS = 1000  # names come from clients
TOKENIZE, DETOKENIZE = ("/v1/tokenize", "/tokenize"), ("/v1/detokenize", "/detokenize")  # SGLang's, and everybody's
IMAGE_TOKENS = "/v1/images/tokens"
TOKENS = (*TOKENIZE, *DETOKENIZE, IMAGE_TOKENS)

Model = TypeVar("Model", bound=ServedModel)
Ask = Callable[[Any, RequestContext, Model], Awaitable[object]]
AskForStream = Callable[[Any, RequestContext, Model, Mapping[str, str]], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class ModelRoutes(Generic[Model]):
    """Adds routes that ask `model` to `app`."""

    app: FastAPI
    served: Served
    model: Model
    _warned: set[str] = field(default_factory=set)

    def post(
        self,
        paths: Sequence[str],
        route: Callable[..., Any],
        answer: Any,
        examples: dict[str, Any] | None = None,
        *,
        content: dict[str, Any] | None = None,
        failed: type[Any] = ErrorBody,
    ) -> None:
        """answer, failed: types of bodies; examples: of requests; content: what a stream's looks like. The last path
        stands in the OpenAPI document."""
        success: dict[str, Any] = {"model": answer} if content is None else {"model": answer, "content": content}
        for path in paths:
            self.app.add_api_route(
                path,
                route,
                methods=["POST"],
                responses={200: success, **failures(*OF_A_BODY, body=failed)},
                response_model=None,
                openapi_extra=examples,
                include_in_schema=path == paths[-1],
            )

    def check_name(self, name: str | None) -> None:
        """UserError (404) for a name that this model does not have."""
        self.served.check_name(name, self.model)

    def told(self, body: BaseModel) -> dict[str, str]:
        """Headers that tell the client which of its fields have no effect; the log is told once."""
        fields = ignored_fields(body)
        new = [name for name in fields if name not in self._warned]
        if new and len(self._warned) < MOST_WARNINGS:
            self._warned.update(new)
            logger.warning("requests set fields that have no effect here: %s", ", ".join(new))
        return {IGNORED_FIELDS: ",".join(fields)} if fields else {}

    async def answer(
        self, body: Any, request: Request, ask: Ask[Model], stream: AskForStream[Model] | None = None
    ) -> Response:
        """ask: makes the whole answer of the body; stream: where the body may ask for one."""
        context, headers = context_of(request.scope), self.told(body)
        self.check_name(body.model)
        if stream is not None and body.stream:
            return await stream(body, context, self.model, headers)
        return JsonResponse(await ask(body, context, self.model), headers=headers)


def add_chat(routes: ModelRoutes[ChatModel]) -> None:
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        return await routes.answer(body, request, complete, stream_chat)

    routes.post((CHAT,), create_chat_completion, ChatCompletion, chat_examples(routes.model), content=STREAM)


def add_completions(routes: ModelRoutes[ChatModel]) -> None:
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        return await routes.answer(body, request, complete_texts, stream_texts)

    routes.post((COMPLETIONS,), create_completion, Completion, completion_examples(routes.model.name), content=STREAM)


def add_decisions(routes: ModelRoutes[ChatModel]) -> None:
    name, sees = routes.model.name, routes.model.processor.config.images is not None

    async def create_decision(body: DecisionRequest, request: Request) -> Response:
        return await routes.answer(body, request, decide)

    async def create_system_one_decision(body: SystemOneRequest, request: Request) -> Response:
        return await routes.answer(body, request, decide_system_one)

    routes.post((DECISIONS,), create_decision, DecisionReply | OpenaiDecision, decision_examples(name, sees))
    routes.post((SYSTEMONE,), create_system_one_decision, SystemOneReply, system_one_examples(name, sees))


def add_scores(routes: ModelRoutes[ChatModel]) -> None:
    """At SGLang's path; at vLLM's only without a model that embeds."""

    async def create_score(body: ScoreRequest, request: Request) -> Response:
        return await routes.answer(body, request, score)

    paths = (*((PAIRS,) if routes.served.embed is None else ()), SCORE)
    routes.post(paths, create_score, Scores, score_examples(routes.model.name))


def add_tokens(routes: ModelRoutes[ChatModel]) -> None:
    async def count_tokens(body: TokenizeRequest, request: Request) -> Response:
        return await routes.answer(body, request, tokenize)

    async def join_tokens(body: DetokenizeRequest, request: Request) -> Response:
        return await routes.answer(body, request, detokenize)

    async def count_image_tokens(body: ImageTokensRequest, request: Request) -> Response:
        return await routes.answer(body, request, image_tokens)

    routes.post(TOKENIZE, count_tokens, TokenList)
    routes.post(DETOKENIZE, join_tokens, DetokenizedText)
    routes.post((IMAGE_TOKENS,), count_image_tokens, ImageTokens)


def add_embeddings(routes: ModelRoutes[EmbedModel]) -> None:
    name = routes.model.name

    async def create_embeddings(body: EmbeddingRequest, request: Request) -> Response:
        return await routes.answer(body, request, embed)

    async def create_classification(body: ClassificationRequest, request: Request) -> Response:
        return await routes.answer(body, request, classify)

    routes.post((EMBEDDINGS,), create_embeddings, EmbeddingList, embedding_examples(name))
    routes.post((CLASSIFY,), create_classification, ClassificationList, classification_examples(name))


def add_pairs(routes: ModelRoutes[EmbedModel]) -> None:
    """At vLLM's path, and at SGLang's without a language model."""

    async def create_pair_scores(body: PairsRequest, request: Request) -> Response:
        return await routes.answer(body, request, score_pairs)

    paths = (*((SCORE,) if routes.served.chat is None else ()), PAIRS)
    routes.post(paths, create_pair_scores, PairScores, pair_examples(routes.model.name))
