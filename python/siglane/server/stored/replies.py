"""What `/v1/files` and `/v1/batches` take and answer: OpenAI's shapes."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict  # pydantic reads no other on Python 3.11

from siglane.server.fields import WHOLE
from siglane.server.replies import OutputDetails
from siglane.server.stored.store import Batch, Status, StoredFile

MAX_METADATA = 16
MAX_KEY_CHARACTERS = 64
MAX_VALUE_CHARACTERS = 512
LEAST_EXPIRY, MOST_EXPIRY = 3600, 30 * 86400
SECONDS = {"h": 3600, "d": 86400}


class FileObject(TypedDict):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]


class FileList(TypedDict):
    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(TypedDict):
    id: str
    object: Literal["file"]
    deleted: Literal[True]


class BatchFailure(TypedDict):
    """line: of the input file, null where the whole is at fault."""

    code: str
    message: str
    line: int | None
    param: str | None


class BatchFailures(TypedDict):
    object: Literal["list"]
    data: list[BatchFailure]


class RequestCounts(TypedDict):
    total: int
    completed: int
    failed: int


class InputDetails(TypedDict):
    cached_tokens: int


class BatchUsage(TypedDict):
    """Sums over the answers. cached_tokens is 0: what a cache gave depends on what ran beside a request."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class BatchObject(TypedDict):
    """errors: why the batch failed, or what keeps it waiting; those of its requests are in the file error_file_id.
    usage: when it has ended."""

    id: str
    object: Literal["batch"]
    endpoint: str
    model: str | None
    errors: BatchFailures | None
    input_file_id: str
    completion_window: str
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage | None
    metadata: dict[str, str] | None


class BatchList(TypedDict):
    object: Literal["list"]
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class ExpiresAfter(_Body):
    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=LEAST_EXPIRY, le=MOST_EXPIRY), WHOLE]


Key = Annotated[str, Field(max_length=MAX_KEY_CHARACTERS)]
Value = Annotated[str, Field(max_length=MAX_VALUE_CHARACTERS)]


class BatchRequest(_Body):
    """completion_window: "24h", as OpenAI has it, or any other number of hours or days."""

    input_file_id: str
    endpoint: Literal[
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/decisions",
        "/v1/systemone",
        "/v1/score",
        "/v1/embeddings",
        "/v1/classify",
    ]
    completion_window: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,2}[hd]$")]
    metadata: Annotated[dict[Key, Value], Field(max_length=MAX_METADATA)] | None = None
    output_expires_after: ExpiresAfter | None = None

    @property
    def seconds(self) -> int:
        return int(self.completion_window[:-1]) * SECONDS[self.completion_window[-1]]


def file_reply(file: StoredFile) -> FileObject:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": "batch" if file.purpose == "batch" else "batch_output",
        "status": "processed",
    }


def batch_reply(batch: Batch, waits: str | None) -> BatchObject:
    """waits: why it does not go on at the moment."""
    failures: list[Any] = list(batch.errors)
    if waits is not None and batch.active:
        failures.append({"code": "waiting", "message": waits, "line": None, "param": None})
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": {"object": "list", "data": failures} if failures else None,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": batch.created_at,
        "in_progress_at": batch.times.get("in_progress"),
        "expires_at": batch.expires_at,
        "finalizing_at": batch.times.get("finalizing"),
        "completed_at": batch.times.get("completed"),
        "failed_at": batch.times.get("failed"),
        "expired_at": batch.times.get("expired"),
        "cancelling_at": batch.times.get("cancelling"),
        "cancelled_at": batch.times.get("cancelled"),
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "usage": cast(BatchUsage | None, batch.usage),
        "metadata": None if batch.metadata is None else dict(batch.metadata),
    }


def page(data: list[Any], more: bool) -> Any:
    """OpenAI's list of objects with ids."""
    ids = [one["id"] for one in data]
    first, last = (ids[0], ids[-1]) if ids else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more}
