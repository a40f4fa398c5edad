"""`/v1/files`: inputs and outputs of batches, each seen by the key that it came with alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response

from siglane.errors import UserError
from siglane.server.context import context_of
from siglane.server.errors import JsonResponse, overloaded
from siglane.server.openapi import failures
from siglane.server.served import Served
from siglane.server.stored.replies import LEAST_EXPIRY, MOST_EXPIRY, FileDeleted, FileList, FileObject, file_reply, page
from siglane.server.stored.store import Store, StoredFile, new_id, refusing_disk, storage_full
from siglane.server.stored.upload import Upload, receive, too_large

FILES = "/v1/files"
MAX_UPLOADS = 16  # at one time
FORM_BYTES = 1 << 20  # of a body beside its file
MAX_PAGE = 10_000
ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"
FIELDS = frozenset({"purpose", ANCHOR, SECONDS})


class Uploads:
    """Takes files in, so many at a time."""

    def __init__(self, store: Store, served: Served) -> None:
        self._store, self._served, self._active = store, served, 0

    async def take(self, request: Request) -> StoredFile:
        if self._served.draining or self._active >= MAX_UPLOADS:
            raise overloaded("no more files are taken at the moment; try again")
        self._active += 1
        try:
            with refusing_disk():
                return await self._take(request)
        finally:
            self._active -= 1

    async def _take(self, request: Request) -> StoredFile:
        store, config, client = self._store, self._served.config, context_of(request.scope).client
        allowed = client.limits.max_stored_bytes or config.max_stored_bytes
        left = allowed - await run_in_threadpool(store.stored_bytes, client.owner)
        most = min(config.max_file_bytes, left)
        if left <= 0:
            raise storage_full(allowed)
        if int(request.headers.get("content-length", 0)) > most + FORM_BYTES:
            raise too_large(most)
        upload = Upload(request.headers.get("content-type", ""), store.part_path(), most)
        try:
            await receive(request, upload, config.body_timeout)
            now, seconds = int(time.time()), _checked(upload.fields, config.file_expiry)
            if not upload.size:
                raise UserError("the file is empty", code="empty_file", param="file")
            expires = now + int(seconds) if seconds else None
            file = StoredFile(new_id("file-"), client.owner, "batch", upload.filename, upload.size, now, expires)
            await run_in_threadpool(store.add_file, file, upload.path, allowed)
            return file
        finally:
            await run_in_threadpool(upload.close)


def _checked(fields: Mapping[str, str], default: float) -> float:
    """Seconds that the file is kept, 0 for ever."""
    for name in fields:
        if name not in FIELDS:
            raise UserError(f"{name[:80]} has no meaning here", code="unsupported_field", param=name[:80])
    if fields.get("purpose") != "batch":
        raise UserError("purpose must be batch", code="invalid_value", param="purpose")
    if not fields.keys() & {ANCHOR, SECONDS}:
        return default
    given = fields.get(SECONDS, "")
    if fields.get(ANCHOR) != "created_at" or not given.isascii() or not given.isdigit() or len(given) > 9:
        message = "expires_after needs the anchor created_at and seconds"
        raise UserError(message, code="invalid_value", param="expires_after")
    if not LEAST_EXPIRY <= int(given) <= MOST_EXPIRY:
        message = f"expires_after[seconds] must be between {LEAST_EXPIRY} and {MOST_EXPIRY}"
        raise UserError(message, code="invalid_value", param="expires_after")
    return float(given)


Responses = dict[int | str, dict[str, Any]]
CONTENT = {
    "description": "as it was uploaded or written",
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
}
FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "dependentRequired": {ANCHOR: [SECONDS], SECONDS: [ANCHOR]},
                    "properties": {
                        "file": {"type": "string", "format": "binary", "minLength": 1},
                        "purpose": {"type": "string", "enum": ["batch"]},
                        ANCHOR: {"type": "string", "enum": ["created_at"]},
                        SECONDS: {"type": "integer", "minimum": LEAST_EXPIRY, "maximum": MOST_EXPIRY},
                    },
                }
            }
        },
    }
}


TAKEN: Responses = {200: {"model": FileObject}, **failures(400, 401, 408, 413, 415, 503, 507)}
DELETED: Responses = {200: {"model": FileDeleted}, **failures(401, 404, 409, 507)}


def add_files(app: FastAPI, store: Store, served: Served) -> None:
    uploads = Uploads(store, served)

    @app.post(FILES, responses=TAKEN, response_model=None, openapi_extra=FORM)
    async def create_file(request: Request) -> Response:
        return JsonResponse(file_reply(await uploads.take(request)))

    @app.get(FILES, responses={200: {"model": FileList}, **failures(400, 401)}, response_model=None)
    async def list_files(
        request: Request,
        purpose: str | None = None,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        owner = context_of(request.scope).owner
        found, more = await run_in_threadpool(store.files, owner, purpose, after, limit, order)
        return JsonResponse(page(list(map(file_reply, found)), more))

    @app.get(FILES + "/{file_id}", responses={200: {"model": FileObject}, **failures(401, 404)}, response_model=None)
    async def retrieve_file(file_id: str, request: Request) -> Response:
        found = await run_in_threadpool(store.file, file_id, context_of(request.scope).owner)
        return JsonResponse(file_reply(found))

    @app.delete(FILES + "/{file_id}", responses=DELETED, response_model=None)
    async def delete_file(file_id: str, request: Request) -> Response:
        await run_in_threadpool(store.delete_file, file_id, context_of(request.scope).owner)
        deleted: FileDeleted = {"id": file_id, "object": "file", "deleted": True}
        return JsonResponse(deleted)

    @app.get(
        FILES + "/{file_id}/content",
        responses={200: CONTENT, **failures(401, 404)},
        response_class=FileResponse,
        response_model=None,
    )
    async def retrieve_file_content(file_id: str, request: Request) -> Response:
        """As it was uploaded or written."""
        found = await run_in_threadpool(store.file, file_id, context_of(request.scope).owner)
        path, kind = store.path_of(found.id), "application/octet-stream"
        return FileResponse(path, media_type=kind, filename=found.filename)
