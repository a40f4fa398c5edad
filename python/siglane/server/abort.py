"""POST /abort: ends requests that somebody waits for. Fields as SGLang (`rid`) and vLLM (`request_ids`) have them."""

from __future__ import annotations

from typing import Annotated

from fastapi import FastAPI, Request
from pydantic import ConfigDict, Field, model_validator
from starlette.responses import Response
from typing_extensions import TypedDict  # pydantic reads no other on Python 3.11

from siglane.errors import UserError
from siglane.server.context import context_of
from siglane.server.errors import JsonResponse
from siglane.server.fields import RequestModel, one_of
from siglane.server.openapi import OF_A_BODY, examples, failures
from siglane.server.served import Served

ABORT = ("/abort_request", "/abort_requests", "/abort")  # SGLang's, vLLM's, ours
MAX_IDS = 1024
MAX_ID_CHARACTERS = 256

Id = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARACTERS)]


class AbortRequest(RequestModel):
    """An id is the request's (`x-request-id`) or its answer's (`chatcmpl-...`)."""

    model_config = ConfigDict(json_schema_extra=one_of("request_id", "rid", "request_ids"))

    request_id: Id | None = None
    rid: Id | None = None
    request_ids: Annotated[list[Id], Field(min_length=1, max_length=MAX_IDS)] | None = None

    @model_validator(mode="after")
    def _check(self) -> AbortRequest:
        if sum(value is not None for value in (self.request_id, self.rid, self.request_ids)) != 1:
            raise UserError("send one of request_id, rid and request_ids", code="missing_field", param="request_id")
        if (self.model_extra or {}).get("abort_all"):
            message = "abort_all is not supported: requests are ended by their ids"
            raise UserError(message, code="unsupported_field", param="abort_all")
        return self

    @property
    def ids(self) -> list[str]:
        return self.request_ids or [str(self.request_id or self.rid)]


class Aborted(TypedDict):
    """unknown: ids of no running request of this key."""

    aborted: list[str]
    unknown: list[str]


def add_abort(app: FastAPI, served: Served) -> None:
    async def abort(body: AbortRequest, request: Request) -> Response:
        """Ends requests of the same API key: each is answered with an error of code `request_aborted`."""
        client = context_of(request.scope).client
        ended = {one: served.abort(one, client) for one in dict.fromkeys(body.ids)}
        found: Aborted = {
            "aborted": [one for one, was_there in ended.items() if was_there],
            "unknown": [one for one, was_there in ended.items() if not was_there],
        }
        return JsonResponse(found)

    shown = examples(one={"request_id": "chatcmpl-0123"}, several={"request_ids": ["chatcmpl-0123", "mine"]})
    for path in ABORT:
        app.add_api_route(
            path,
            abort,
            methods=["POST"],
            responses={200: {"model": Aborted}, **failures(*OF_A_BODY)},
            response_model=None,
            openapi_extra=shown,
            include_in_schema=path == ABORT[-1],
        )
