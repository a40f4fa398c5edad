"""The FastAPI application: routes, and every failure in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from siglane.batch.row import CLASSIFY, EMBEDDINGS, OF_CHAT, PAIRS, SCORE
from siglane.errors import EngineError, UserError
from siglane.server.abort import ABORT, add_abort
from siglane.server.context import context_of
from siglane.server.errors import JsonResponse, error_response, from_validation
from siglane.server.messages.blocks import AnthropicShape
from siglane.server.messages.routes import COUNT_TOKENS, MESSAGES, add_messages
from siglane.server.metrics import METHODS
from siglane.server.middleware import OPEN_PATHS, TIMINGS, Authenticate, Gate, Intake, Observe, UnderRoot, shutting_down
from siglane.server.openapi import document, failures
from siglane.server.playground import PATH as PLAYGROUND
from siglane.server.playground import add_playground
from siglane.server.replies import Health, ModelCard, ModelList, Ready
from siglane.server.responses.routes import RESPONSES, STORED_RESPONSES, add_responses
from siglane.server.routes import (
    IGNORED_FIELDS,
    TOKENS,
    ModelRoutes,
    add_chat,
    add_completions,
    add_decisions,
    add_embeddings,
    add_pairs,
    add_scores,
    add_tokens,
)
from siglane.server.served import Served
from siglane.server.stored.batch_runner import BatchRunner
from siglane.server.stored.batches import BATCHES, add_batches
from siglane.server.stored.files import FILES, add_files
from siglane.server.stored.store import Store
from siglane.server.traces import Traces
from siglane.server.view import IMAGE_VIEW, add_view


class _OrjsonRequest(Request):
    async def json(self) -> Any:
        return orjson.loads(await self.body())  # refuses NaN, Infinity, lone surrogates and deep nesting


class _Route(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_with_orjson(request: Request) -> Response:
            return await handle(_OrjsonRequest(request.scope, request.receive))

        return handle_with_orjson


def create_app(served: Served, traces: Traces | None = None) -> FastAPI:
    """The application around the models of one server. Its routes hold nothing of their own; those that have no model
    say why they are not served. traces: where its requests are recorded."""
    store = None if served.config.data_dir is None else Store(served.config.data_dir)
    runner = None if store is None else BatchRunner(store, served)
    lifespan = None if runner is None else runner.running
    # no docs pages: they load scripts from elsewhere; no redirects: they would repeat the Host header of the client
    app = FastAPI(title="siglane", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    app.router.route_class = _Route
    _add_middleware(app, served, traces)
    for kind, answer in _failures().items():
        app.add_exception_handler(kind, answer)
    _add_probes(app, served)
    _add_models(app, served)
    add_abort(app, served)
    if served.config.playground:
        add_playground(app)
    _add_routes_of_chats(app, served)
    _add_routes_of_towers(app, served)
    if store is not None and runner is not None:
        add_files(app, store, served)
        add_batches(app, store, runner, served)
    else:
        paths = [path + rest for path in (FILES, BATCHES) for rest in ("", "/{rest:path}")]
        _add_refusals(app, paths, "start the server with --data-dir FOLDER")
    app.openapi = document(app, served, OPEN_PATHS)  # type: ignore[method-assign]
    return app


def _add_routes_of_chats(app: FastAPI, served: Served) -> None:
    if served.chat is None:
        paths = [path for path in (*OF_CHAT, RESPONSES, MESSAGES, COUNT_TOKENS) if path != SCORE]
        _add_refusals(app, paths, f"{served.name!r} embeds and classifies; a chat needs a vision-language model")
        message = f"{served.name!r} embeds and classifies; its prompts are single texts"
        _add_refusals(app, (*TOKENS, IMAGE_VIEW), message)
        return
    routes = ModelRoutes(app, served, served.chat)
    for add in (add_chat, add_completions, add_decisions, add_scores, add_responses, add_messages, add_tokens):
        add(routes)
    _add_refusals(app, STORED_RESPONSES, "responses are not stored; send the conversation with each request")
    add_view(app, served, served.chat)


def _add_routes_of_towers(app: FastAPI, served: Served) -> None:
    if served.embed is None:
        reason = f"{served.name!r} chats; embeddings need a SigLIP with both towers beside it (siglane serve --tagger)"
        _add_refusals(app, (EMBEDDINGS, CLASSIFY), reason)
        return
    routes = ModelRoutes(app, served, served.embed)
    add_embeddings(routes)
    add_pairs(routes)


def _add_middleware(app: FastAPI, served: Served, traces: Traces | None) -> None:
    config = served.config
    gate = Gate(config.max_queue, served.refusal, served.metrics)
    of_chat = {*OF_CHAT, RESPONSES, MESSAGES, COUNT_TOKENS, *TOKENS, IMAGE_VIEW}
    paths = {PAIRS} | (of_chat if served.chat is not None else set())
    paths |= {EMBEDDINGS, CLASSIFY, SCORE} if served.embed is not None else set()
    paths |= {BATCHES} if config.data_dir is not None else set()
    # the last one added is the outermost
    app.add_middleware(
        Intake,
        paths=frozenset(paths),
        free=frozenset(ABORT),
        gate=gate,
        running=served.running,
        max_bytes=config.max_body_bytes,
        timeout=config.body_timeout,
    )
    open_paths = OPEN_PATHS | ({PLAYGROUND} if config.playground else set())
    app.add_middleware(Authenticate, clients=served.clients, open_paths=open_paths)
    if config.cors_origins:  # outside the key: browsers send none when they ask whether they may call
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST", "DELETE"] if config.data_dir is not None else ["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-api-key", "anthropic-version", TIMINGS.decode()],
            expose_headers=["x-request-id", IGNORED_FIELDS],
        )
    app.add_middleware(Observe, metrics=served.metrics, inflight=served.inflight_bytes, traces=traces)
    app.add_middleware(AnthropicShape, path=MESSAGES)
    if config.root_path:
        app.add_middleware(UnderRoot, root=config.root_path)


def _failures() -> dict[type[Exception], Callable[[Request, Any], Response]]:
    def refused(request: Request, error: UserError | EngineError) -> Response:
        context_of(request.scope).failed = error.code
        return error_response(error)

    def invalid(request: Request, error: RequestValidationError) -> Response:
        return refused(request, from_validation(error.errors()))

    def no_route(request: Request, error: HTTPException) -> Response:
        message, code = "there is no such path", "not_found"
        if error.status_code == 405:
            message, code = "this path does not take this method", "method_not_allowed"
        elif error.status_code != 404:
            message, code = str(error.detail), "http_error"
        return error_response(UserError(message, code=code, status=error.status_code), error.headers)

    return {UserError: refused, EngineError: refused, RequestValidationError: invalid, HTTPException: no_route}


def _add_probes(app: FastAPI, served: Served) -> None:
    @app.get("/health", responses={200: {"model": Health}, **failures(503)}, response_model=None)
    async def health() -> Response:
        """Whether the process works: 503 only when its engine is gone."""
        if served.engine.state in ("starting", "ready"):
            return JsonResponse({"status": "ok", "engine": served.engine.state})
        return error_response(served.refusal() or shutting_down())

    @app.get("/ready", responses={200: {"model": Ready}, **failures(503)}, response_model=None)
    async def ready() -> Response:
        """Whether new requests are taken."""
        refusal = served.refusal()
        return JsonResponse({"status": "ready"}) if refusal is None else error_response(refusal)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        content = await run_in_threadpool(generate_latest, served.metrics.registry)
        return Response(content, media_type=CONTENT_TYPE_LATEST)


def _add_models(app: FastAPI, served: Served) -> None:
    @app.get("/v1/models", responses=failures(401))
    async def list_models() -> ModelList:
        return {"object": "list", "data": served.cards()}

    @app.get("/v1/models/{name:path}", responses=failures(401, 404))
    async def get_model(name: str) -> ModelCard:
        return served.card(name)


def _add_refusals(app: FastAPI, paths: Sequence[str], reason: str) -> None:
    async def refuse() -> Response:
        raise UserError(f"this path is not served: {reason}", code="not_found", status=404)

    for path in paths:
        app.add_api_route(path, refuse, methods=list(METHODS), include_in_schema=False)
