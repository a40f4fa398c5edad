"""What is asked of a model that calls tools as its script says (`write_calling_checkpoint`)."""

from __future__ import annotations

from typing import Any

from scripted_checkpoint import CHOSEN, CITY, HEAD, TAIL
from serving import RunningServer, Told, chat


def tool(name: str, strict: bool | None = None, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    function = {"name": name, "description": f"tells the {name}", "parameters": schema}
    return {"type": "function", "function": function | ({} if strict is None else {"strict": strict})}


WEATHER, CLOCK = tool("weather", city={"enum": ["Bern", "Zürich"]}), tool("time")
BOTH = [WEATHER, CLOCK]
IN_BERN, NOW = ("weather", '{"city": "Bern"}'), ("time", "{}")  # what it calls
CALL = f"<tool_call>{HEAD}{CITY}{TAIL}</tool_call>"


def bias(server: RunningServer, *said: str) -> dict[str, float]:
    """Chooses tokens that the script leaves open."""
    tokenizer = server.served.chat.processor.tokenizer  # type: ignore[union-attr]
    return {str(tokenizer.convert_tokens_to_ids(token)): CHOSEN for token in said}


def question(server: RunningServer, *said: str, **fields: Any) -> dict[str, Any]:
    """A chat. said: as of `bias`."""
    asked = {"max_tokens": 120, "tools": BOTH, "logit_bias": bias(server, *said), **fields}
    return chat("How warm is it?", **asked)


def of(message: dict[str, Any]) -> list[tuple[str, str]]:
    calls = message.get("tool_calls", [])
    assert all(call["type"] == "function" and call["id"].startswith("call_") for call in calls)
    assert len({call["id"] for call in calls}) == len(calls)
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


def joined(told: Told, index: int = 0) -> tuple[dict[str, Any], str]:
    """A choice of a stream as clients put it together, and how it ended."""
    message: dict[str, Any] = {"content": None}
    reason = None
    for chunk in told.chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            delta, reason = choice["delta"], choice["finish_reason"] or reason
            for key in ("content", "reasoning_content"):
                if delta.get(key):
                    message[key] = (message.get(key) or "") + delta[key]
            for call in delta.get("tool_calls", ()):
                calls = message.setdefault("tool_calls", [])
                if call["index"] == len(calls):
                    calls.append({"id": call["id"], "type": call["type"], "function": {**call["function"]}})
                else:
                    assert call.keys() == {"index", "function"}
                    calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    assert told.done
    assert reason is not None
    return message, reason
