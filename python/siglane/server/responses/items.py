"""The items of a response, and the events that tell of them while they grow."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from siglane.engine.answers.tool_calls import CallDelta
from siglane.server.responses.protocol import OutputItem
from siglane.server.translated import AnswerParts, Event

ItemKind = Literal["message", "function_call", "reasoning"]
PREFIXES: Mapping[ItemKind, str] = {"message": "msg", "function_call": "fc", "reasoning": "rs"}


class Output(AnswerParts):
    """The items of a response."""

    def __init__(self) -> None:
        self.items: list[OutputItem] = []
        self._open: OutputItem | None = None

    def end(self, status: Literal["completed", "incomplete"]) -> Iterator[Event]:
        """A response that says nothing says so in a message."""
        if all(item["type"] == "reasoning" for item in self.items):
            yield from self._grow("text", "")
        yield from self._close(status)

    def _take_call(self, call: CallDelta) -> Iterator[Event]:
        if call.name:
            yield from self._begin("function_call", call_id=call.call_id, name=call.name, arguments="")
        self.items[-1]["arguments"] += call.arguments
        if call.arguments:
            yield self._event("response.function_call_arguments.delta", delta=call.arguments)

    def _grow(self, said: Literal["reasoning", "text"], text: str) -> Iterator[Event]:
        kind: ItemKind = "message" if said == "text" else said
        if self._open is None or self._open["type"] != kind:
            fields: dict[str, Any] = {"summary": []} if kind == "reasoning" else {"role": "assistant"}
            yield from self._begin(kind, content=[], **fields)
            self.items[-1]["content"] = [part] = [_empty_part(kind)]
            yield self._event("response.content_part.added", content_index=0, part={**part})
        self.items[-1]["content"][0]["text"] += text
        if text:
            yield self._event(f"response.{_text_kind(kind)}.delta", content_index=0, delta=text, **_logprobs(kind))

    def _begin(self, kind: ItemKind, **fields: Any) -> Iterator[Event]:
        yield from self._close("completed")
        item_id = f"{PREFIXES[kind]}_{secrets.token_hex(12)}"
        item: OutputItem = {"id": item_id, "type": kind, "status": "in_progress", **fields}  # type: ignore[typeddict-item]
        self.items.append(item)
        self._open = item
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": {**item}}

    def _close(self, status: Literal["completed", "incomplete"]) -> Iterator[Event]:
        if self._open is None:
            return
        item, self._open = self._open, None
        item["status"] = status
        if item["type"] == "function_call":
            names = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **names)
        else:
            (part,) = item["content"]
            kind = item["type"]
            yield self._event(
                f"response.{_text_kind(kind)}.done", content_index=0, text=part["text"], **_logprobs(kind)
            )
            yield self._event("response.content_part.done", content_index=0, part=part)
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}

    def _event(self, kind: str, **fields: Any) -> Event:
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}


def _text_kind(kind: ItemKind) -> str:
    return "output_text" if kind == "message" else "reasoning_text"


def _empty_part(kind: ItemKind) -> dict[str, Any]:
    told: dict[str, list[Any]] = {"annotations": [], "logprobs": []} if kind == "message" else {}
    return {"type": _text_kind(kind), "text": "", **told}


def _logprobs(kind: ItemKind) -> dict[str, Any]:
    return {"logprobs": []} if kind == "message" else {}
