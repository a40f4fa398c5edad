"""Every failure as one body: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.responses import Response
from typing_extensions import TypedDict

from siglane.errors import EngineError, UserError

Body = TypeVar("Body", bound=BaseModel)


LONGEST_MESSAGE = 480
LONG_WORD = re.compile(r"[^\s,]{100,}")


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(TypedDict):
    """What every failed request answers, and the last event of a stream that failed."""

    error: ErrorDetail


class JsonResponse(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


class RateLimited(UserError):
    """A key has had its share for now. seconds: until it is worth another try."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(f"{message}; try again later", code="rate_limit_exceeded", status=429)
        self.seconds = seconds


def as_api_error(error: BaseException) -> UserError | EngineError:
    """`error` if it was raised on purpose; else a 500 that tells nothing about the server (the log has the rest)."""
    if isinstance(error, UserError | EngineError):
        return error
    return EngineError("internal error; the server's log has it under this x-request-id", code="internal_error")


def error_body(error: UserError | EngineError) -> ErrorBody:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    if error.status == 429:
        kind = "rate_limit_error"
    param = error.param if isinstance(error, UserError) else None
    return {"error": {"message": message_of(error), "type": kind, "param": param, "code": error.code}}


def message_of(error: UserError | EngineError) -> str:
    """One line. What a client sent at length is only begun: it may be a picture that stands in the wrong field."""
    line = LONG_WORD.sub(lambda word: f"{word[0][:40]}...", " ".join(error.message.split()))
    return line if len(line) <= LONGEST_MESSAGE else f"{line[: LONGEST_MESSAGE - 3]}..."


def error_response(error: UserError | EngineError, headers: Mapping[str, str] | None = None) -> JsonResponse:
    return JsonResponse(error_body(error), error.status, {**_headers(error), **(headers or {})})


def _headers(error: UserError | EngineError) -> dict[str, str]:
    status = error.status
    if isinstance(error, RateLimited):
        return {"retry-after": str(max(1, math.ceil(error.seconds)))}
    if status == 503:
        return {"retry-after": "1"}
    if status == 401:
        return {"www-authenticate": "Bearer"}
    if status in (408, 413):  # what the client still sends would be taken for its next request
        return {"connection": "close", "x-should-retry": "false"}
    if status >= 500:  # openai clients would send the same bad request two more times
        return {"x-should-retry": "false"}
    return {}


def overloaded(message: str, code: str = "server_overloaded") -> EngineError:
    """A 503 that is worth another try."""
    return EngineError(message, code=code, status=503)


def aborted() -> UserError:
    """499: the answer is not wanted any more, by its own client."""
    return UserError("the request was aborted by its client", code="request_aborted", status=499)


def from_validation(errors: Sequence[Mapping[str, Any]]) -> UserError:
    """The first thing that is wrong with a request body. Never repeats what the client sent: that may be an image."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return UserError(f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    param = param_of(first["loc"])
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, UserError):
        where = ".".join(part for part in (param, raised.param) if part)
        return raised.at(where) if where else raised
    if param is None:
        return UserError("the body must be a JSON object", code="invalid_body")
    if first["type"] == "missing":
        return UserError(f"{param} is required", code="missing_field", param=param)
    what = "must be an object" if first["type"] in ("model_type", "model_attributes_type") else first["msg"]
    return UserError(f"{param}: {what[:1].lower()}{what[1:]}", code="invalid_value", param=param)


def validated(kind: type[Body], given: Mapping[str, Any]) -> Body:
    """A body as a route reads it. UserError where it is none."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise from_validation([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from None


def param_of(loc: Sequence[int | str]) -> str | None:
    """`("body", "messages", 0, "#parts", "content", 1)` -> `messages[0].content[1]`; tags of unions begin with '#'."""
    param = ""
    for step in loc[1:]:
        if isinstance(step, int):
            param += f"[{step}]"
        elif not step.startswith("#"):
            name = re.sub(r"[^\w-]", "?", step[:64])  # a client's own, where names are its own to choose
            param += f".{name}" if param else name
    return param or None
