"""Answers that call tools, as a grammar: calls in Hermes' format, each with arguments that match its function's schema.

<tool_call>
{"name": "weather", "arguments": {"city": "Bern"}}
</tool_call>
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from siglane.errors import UserError
from siglane.families.prompt.tools import CALL_TAGS, CALL_TAIL, call_head
from siglane.types import Constraint, Tool, ToolUse

Schema = dict[str, Any]


class Calls(NamedTuple):
    """functions: names and the schemas of their arguments; required: the answer is nothing but calls; parallel: it may
    hold several; answer: schema of an answer that calls nothing, None for any text."""

    functions: list[tuple[str, Schema]]
    required: bool
    parallel: bool
    answer: Schema | None


class Tags(NamedTuple):
    """What begins and ends a call, as terms of a grammar."""

    begin: str
    end: str

    @classmethod
    def of(cls, begin: int | None, end: int | None) -> Tags:
        """By the ids of their tokens, None where the tokenizer has none."""
        known = zip((begin, end), CALL_TAGS, strict=True)
        return cls(*(json.dumps(text) if token_id is None else f"<[{token_id}]>" for token_id, text in known))


def tool_constraint(use: ToolUse, answer: Constraint | None = None) -> Constraint | None:
    """What an answer with tools has to match; None for nothing, where calls are the model's own affair.

    answer: what one that calls nothing has to match. Only JSON can be told from calls: else UserError.
    """
    if use.required:
        return _constraint(use, None)
    if answer is not None and answer.kind != "json_schema":
        message = "beside tools that a model may call, an answer can be asked to be JSON and nothing else"
        raise UserError(message, code="unsupported_field")
    exact = answer is not None or any(tool.strict for tool in use.callable)
    return _constraint(use, answer) if exact else None


def _constraint(use: ToolUse, answer: Constraint | None) -> Constraint:
    functions = [(tool.name, _arguments(tool, exact=use.required or tool.strict)) for tool in use.callable]
    calls = Calls(functions, use.required, use.parallel, None if answer is None else json.loads(answer.text))
    return Constraint("tools", json.dumps(calls))


def _arguments(tool: Tool, *, exact: bool) -> Schema:
    """Of an object whatever the schema leaves open."""
    if tool.parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **tool.parameters} if exact else {"type": "object"}


def read_calls(text: str) -> Calls:
    """What `tool_constraint` has written."""
    functions, required, parallel, answer = json.loads(text)
    return Calls([(name, schema) for name, schema in functions], required, parallel, answer)


def lark(calls: Calls, tags: Tags, options: Mapping[str, Any]) -> str:
    """A grammar in llguidance's dialect of Lark. options: of its JSON.

    In a text a tag may come letter by letter; that it is a token of its own does not show.
    """
    rules = [f"body: {_either('body', len(calls.functions))}"]
    for number, (name, schema) in enumerate(calls.functions):
        head, tail = json.dumps(call_head(name)), json.dumps(CALL_TAIL)
        rules.append(f"body_{number}: {head} arguments_{number} {tail} {tags.end}")
        rules.append(f"arguments_{number}: {_json(schema, options)}")
    call = f"{tags.begin} body"
    several = f'{call} ("\\n" {call})*' if calls.parallel else call
    if calls.required:
        return "\n".join([f"start: {several}", *rules])
    if calls.answer is not None:
        return "\n".join([f"start: answer | {several}", f"answer: {_json(calls.answer, options)}", *rules])
    rules += [
        f"call: TEXT {call} | begun body" if tags.begin.startswith("<") else "call: begun body",
        f"begun[lazy]: TEXT {json.dumps(CALL_TAGS[0])}",
        "TEXT: /(.|\\n)*/",
    ]
    return "\n".join(["start: call* TEXT" if calls.parallel else "start: TEXT | call", *rules])


def _either(name: str, count: int) -> str:
    return " | ".join(f"{name}_{number}" for number in range(count))


def _json(schema: Schema, options: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": dict(options)})
