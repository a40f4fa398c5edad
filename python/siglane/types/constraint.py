"""What an answer has to match."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

ConstraintKind = Literal["json_schema", "regex", "lark", "tools"]


@dataclass(frozen=True, slots=True)
class Constraint:
    """The whole of an answer's text matches it; a reasoning model's thinking before it is free.

    text: a JSON schema (draft 2020-12) as JSON, a regular expression (Rust's syntax, no look-around), or a Lark grammar
    (llguidance's dialect) with the rule `start`, or one in GBNF with the rule `root`. Calls of tools are described by
    `engine/constraints/tool_grammar.py`.
    """

    kind: ConstraintKind
    text: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool) -> Constraint:
        """An answer that is JSON of a schema, its properties in the schema's order."""
        return cls("json_schema", json.dumps(schema))

    @classmethod
    def json_object(cls) -> Constraint:
        """An answer that is some JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def choice(cls, options: Sequence[str]) -> Constraint:
        """An answer that is one of `options`, letter by letter."""
        return cls("lark", "start: " + " | ".join(map(json.dumps, options)))
