"""How a row looks in the two files of a batch, and in a table that is made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

from siglane.batch.row import BadRow, Row


class Answer(NamedTuple):
    """What a server answers. status: as in HTTP; body: OpenAI's, of an error where the status is 400 or more; ignored:
    fields of the request that had no effect."""

    status: int
    body: Mapping[str, Any]
    ignored: tuple[str, ...] = ()


def failed(status: int, code: str, message: str) -> Answer:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return Answer(status, {"error": {"message": message, "type": kind, "param": None, "code": code}})


class Form(Protocol):
    """key: the field that tells rows apart, and the table's first column; columns: its last ones, after those that are
    kept of the input."""

    @property
    def key(self) -> str: ...

    @property
    def columns(self) -> tuple[str, ...]: ...

    def answered(self, row: Row, answer: Answer) -> dict[str, Any]: ...

    def failed(self, row: Row | BadRow, answer: Answer | None, error: Mapping[str, str]) -> dict[str, Any]:
        """The line of the errors file, which gets its number too. answer: None for a row that was not asked."""
        ...

    def kinds(self, arrow: Any, line: Mapping[str, Any] | None) -> list[Any]:
        """pyarrow's types of `columns`. line: one of a row that was answered, None where none was."""
        ...

    def values(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `columns` that a line of either file has a value for."""
        ...


class OpenAIForm:
    """OpenAI's batch output."""

    key = "custom_id"
    counts = ("prompt_tokens", "completion_tokens")
    columns = ("answer", "finish_reason", *counts, "error_code", "error_message", "response")

    def answered(self, row: Row, answer: Answer) -> dict[str, Any]:
        return self._line(row, answer)

    def failed(self, row: Row | BadRow, answer: Answer | None, error: Mapping[str, str]) -> dict[str, Any]:
        return self._line(row, answer) | {"error": error}

    def kinds(self, arrow: Any, line: Mapping[str, Any] | None) -> list[Any]:
        return [arrow.int64() if name in self.counts else arrow.string() for name in self.columns]

    def values(self, line: Mapping[str, Any]) -> dict[str, Any]:
        values = _errors_of(line)
        body = line["response"]["body"] if line["response"] is not None else {}
        if line["response"] is not None:
            values["response"] = json.dumps(body)
        if choices := body.get("choices"):
            values["answer"] = choices[0].get("message", {}).get("content", choices[0].get("text"))
            values["finish_reason"] = choices[0].get("finish_reason")
        if usage := body.get("usage"):
            values |= {name: usage.get(name) for name in self.counts}
        return values

    def _line(self, row: Row | BadRow, answer: Answer | None) -> dict[str, Any]:
        name = blake2b(f"{row.number} {row.custom_id}".encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
        line: dict[str, Any] = {"id": f"batch_req_{name}", "custom_id": row.custom_id, "response": None, "error": None}
        if answer is not None:
            body = _settled(answer.body, name)
            line["response"] = {"status_code": answer.status, "request_id": f"req_{name}", "body": body}
        return line


OPENAI = OpenAIForm()


def _settled(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An answer without what depends on when and beside whom it was computed, so that a batch that was stopped ends
    with the bytes of one that was not: no time, an id of the row's own, no count of cached tokens."""
    settled = dict(body)
    if "id" in settled:
        kind, dash, _ = str(settled["id"]).partition("-")
        settled["id"] = f"{kind if dash else 'chatcmpl'}-{name}"
    if "created" in settled:
        settled["created"] = 0
    usage = settled.get("usage")
    if isinstance(usage, Mapping) and isinstance(details := usage.get("prompt_tokens_details"), Mapping):
        details = {key: value for key, value in details.items() if key != "cached_tokens"}
        settled["usage"] = {**usage, "prompt_tokens_details": details}
    return settled


@dataclass(frozen=True)
class PlainForm:
    """`{"image": "a.png", "tags": [...]}`: the row's name under `key`, and what the answer holds under `field`."""

    key: str
    field: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.field, "error_code", "error_message")

    def answered(self, row: Row, answer: Answer) -> dict[str, Any]:
        return {self.key: row.custom_id, self.field: answer.body[self.field]}

    def failed(self, row: Row | BadRow, answer: Answer | None, error: Mapping[str, str]) -> dict[str, Any]:
        return {self.key: row.custom_id, "error": error}

    def kinds(self, arrow: Any, line: Mapping[str, Any] | None) -> list[Any]:
        if self.field == "tags":
            kind = arrow.list_(arrow.struct([("label", arrow.string()), ("confidence", arrow.float32())]))
        else:
            kind = arrow.list_(arrow.float32(), -1 if line is None else len(line[self.field]))
        return [kind, arrow.string(), arrow.string()]

    def values(self, line: Mapping[str, Any]) -> dict[str, Any]:
        return {self.field: line[self.field]} if "error" not in line else _errors_of(line)


def _errors_of(line: Mapping[str, Any]) -> dict[str, Any]:
    if line["error"] is None:
        return {}
    return {"error_code": line["error"]["code"], "error_message": line["error"]["message"]}
