"""`/v1/batches`: many requests that wait for the others, each seen by the key that it came with alone."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from siglane.batch.row import OF_CHAT, SCORE
from siglane.errors import UserError
from siglane.server.context import context_of
from siglane.server.errors import JsonResponse
from siglane.server.openapi import OF_A_BODY, failures
from siglane.server.served import Served
from siglane.server.stored.batch_runner import BatchRunner
from siglane.server.stored.replies import BatchList, BatchObject, BatchRequest, batch_reply, page
from siglane.server.stored.store import Batch, Store, new_id

BATCHES = "/v1/batches"
MAX_PAGE = 100

Responses = dict[int | str, dict[str, Any]]


def batch_of(body: BatchRequest, owner: str, served: Served) -> Batch:
    """UserError for an endpoint that no model of this server answers."""
    model = served.chat if body.endpoint in OF_CHAT else served.embed
    model = model or (served.embed if body.endpoint == SCORE else None)
    if model is None:
        raise UserError(f"{served.name!r} does not answer {body.endpoint}", code="invalid_value", param="endpoint")
    now, kept = int(time.time()), body.output_expires_after
    return Batch(
        id=new_id("batch_"),
        owner=owner,
        input_file_id=body.input_file_id,
        endpoint=body.endpoint,
        completion_window=body.completion_window,
        created_at=now,
        expires_at=now + body.seconds,
        file_seconds=served.config.file_expiry if kept is None else kept.seconds,
        metadata=body.metadata,
        model=model.name,
    )


def cancelled(batch: Batch) -> Batch:
    """UserError (409) for one that has ended, or is about to."""
    if batch.status == "cancelling":
        return batch
    if batch.status not in ("validating", "in_progress"):
        message = f"a batch that is {batch.status} cannot be cancelled"
        raise UserError(message, code="invalid_status", status=409)
    return batch.turned("cancelling")


def add_batches(app: FastAPI, store: Store, runner: BatchRunner, served: Served) -> None:
    created: Responses = {200: {"model": BatchObject}, **failures(*OF_A_BODY, 507)}
    found: Responses = {200: {"model": BatchObject}, **failures(401, 404)}
    ended: Responses = {200: {"model": BatchObject}, **failures(401, 404, 409, 507)}

    def reply(batch: Batch) -> BatchObject:
        return batch_reply(batch, runner.why_paused(batch.id))

    @app.post(BATCHES, responses=created, response_model=None)
    async def create_batch(body: BatchRequest, request: Request) -> Response:
        batch = batch_of(body, context_of(request.scope).owner, served)
        await run_in_threadpool(store.add_batch, batch)
        runner.wake()
        return JsonResponse(reply(batch))

    @app.get(BATCHES, responses={200: {"model": BatchList}, **failures(400, 401)}, response_model=None)
    async def list_batches(
        request: Request, after: str | None = None, limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 20
    ) -> Response:
        page_of, more = await run_in_threadpool(store.batches, context_of(request.scope).owner, after, limit)
        return JsonResponse(page(list(map(reply, page_of)), more))

    @app.get(BATCHES + "/{batch_id}", responses=found, response_model=None)
    async def retrieve_batch(batch_id: str, request: Request) -> Response:
        return JsonResponse(reply(await run_in_threadpool(store.batch, batch_id, context_of(request.scope).owner)))

    @app.post(BATCHES + "/{batch_id}/cancel", responses=ended, response_model=None)
    async def cancel_batch(batch_id: str, request: Request) -> Response:
        owner = context_of(request.scope).owner
        batch = await run_in_threadpool(store.update, batch_id, cancelled, owner)
        runner.wake()
        return JsonResponse(reply(batch))
