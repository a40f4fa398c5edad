"""What is asked of a model that calls tools as its script says (`write_calling_checkpoint`)."""

from __future__ import annotations

from typing import Any

from scripted_checkpoint import CHOSEN, CITY, HEAD, TAIL
from serving import RunningServer, chat


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
