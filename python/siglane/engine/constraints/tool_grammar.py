"""Answers that call tools, as a grammar: calls in a model's own form, with arguments that match their functions'
schemas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple
from typing import Any, NamedTuple

from siglane.errors import UserError
from siglane.families.prompt.call_format import NEXT, CallFormat
from siglane.types import Constraint, Tool, ToolUse

Schema = dict[str, Any]


class Calls(NamedTuple):
    """form: how they are written; functions: names and the schemas of their arguments; required: the answer is nothing
    but calls; parallel: it may hold several; answer: schema of an answer that calls nothing, None for any text."""

    form: CallFormat

    functions: list[tuple[str, Schema]]
    required: bool
    parallel: bool
    answer: Schema | None


class Tags(NamedTuple):
    """What begins and ends a call, as terms of a grammar; "" for none."""

    begin: str
    end: str

    @classmethod
    def of(cls, form: CallFormat, token_ids: Mapping[str, int]) -> Tags:
        """token_ids: of the tokenizer's own tokens."""
        tags = form.opening, form.closing
        return cls(*(f"<[{token_ids[tag]}]>" if tag in token_ids else _text(tag) for tag in tags))


def tool_constraint(use: ToolUse, form: CallFormat, answer: Constraint | None = None) -> Constraint | None:
    """What an answer with tools has to match; None for nothing, where calls are the model's own affair.

    form: of the calls; answer: what one that calls nothing has to match. Only JSON can be told from calls: else
    UserError.
    """
    if use.required:
        return _constraint(use, form, None)
    if answer is not None and answer.kind != "json_schema":
        message = "beside tools that a model may call, an answer can be asked to be JSON and nothing else"
        raise UserError(message, code="unsupported_field")
    exact = answer is not None or any(tool.strict for tool in use.callable)
    return _constraint(use, form, answer) if exact else None


def _constraint(use: ToolUse, form: CallFormat, answer: Constraint | None) -> Constraint:
    functions = [(tool.name, _arguments(tool, exact=use.required or tool.strict)) for tool in use.callable]
    otherwise = None if answer is None else json.loads(answer.text)
    return Constraint("tools", json.dumps([astuple(form), functions, use.required, use.parallel, otherwise]))


def _arguments(tool: Tool, *, exact: bool) -> Schema:
    """Of an object whatever the schema leaves open."""
    if tool.parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **tool.parameters} if exact else {"type": "object"}


def read_calls(text: str) -> Calls:
    """What `tool_constraint` has written."""
    form, functions, required, parallel, answer = json.loads(text)
    return Calls(CallFormat(*form), [(name, schema) for name, schema in functions], required, parallel, answer)


def lark(calls: Calls, tags: Tags, options: Mapping[str, Any]) -> str:
    """A grammar in llguidance's dialect of Lark. options: of its JSON.

    In a text a tag may come letter by letter; that it is a token of its own does not show.
    """
    form = calls.form
    rules = [f"call: {_either('call', len(calls.functions))}"]
    for number, (name, schema) in enumerate(calls.functions):
        rules.append(f'call_{number}: {_text(form.head(name))} arguments_{number} "}}"')
        rules.append(f"arguments_{number}: {_json(schema, options)}")
    within = f"call ({_text(NEXT)} call)*" if form.listed and calls.parallel else "call"
    rules.append(f"body: {_text(form.before)} {within} {_text(form.after)} {tags.end}")
    one = f"{tags.begin} body"
    several = f'{one} ("\\n" {one})*' if calls.parallel and form.opening and not form.listed else one
    if calls.required:
        rules.append(f"start: {several}")
    elif calls.answer is not None:
        rules += [f"start: answer | {several}", f"answer: {_json(calls.answer, options)}"]
    elif form.opening:
        rules += [
            "start: calls* TEXT" if calls.parallel else "start: TEXT | calls",
            f"calls: TEXT {one} | begun body" if tags.begin.startswith("<") else "calls: begun body",
            f"begun[lazy]: TEXT {_text(form.opening)}",
            "TEXT: /(.|\\n)*/",
        ]
    else:
        rules += ["start: body | TEXT", r"TEXT: /(\s*[^\s{](.|\n)*)?/"]
    return "\n".join(rules)


def _text(text: str) -> str:
    """A text as a term; nothing for none."""
    return json.dumps(text) if text else ""


def _either(name: str, count: int) -> str:
    return " | ".join(f"{name}_{number}" for number in range(count))


def _json(schema: Schema, options: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": dict(options)})
