"""Functions that a model is told of and may call instead of answering."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, eq=False)
class Tool:
    """A function. parameters: JSON schema of its arguments, an object; None for none; strict: calls are held to it."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    @property
    def definition(self) -> dict[str, Any]:
        """OpenAI's, as chat templates print it."""
        stated = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": {key: value for key, value in stated.items() if value is not None}}

    @property
    def characters(self) -> int:
        """Of what the model is told of it."""
        return len(json.dumps(self.definition, ensure_ascii=False))


@dataclass(frozen=True, slots=True, eq=False)
class ToolUse:
    """What one answer may do with tools.

    tools: those that the model is told of; callable: those of them that it may call; required: it calls, and says
    nothing else; parallel: it may call more than once.
    """

    tools: tuple[Tool, ...]
    callable: tuple[Tool, ...]
    required: bool = False
    parallel: bool = True
