"""Answers held to a schema, an expression or a grammar over HTTP: every spelling, streamed or not."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import pytest
from pydantic import BaseModel
from serving import RunningServer, assert_error, chat, image_part, picture, stream

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer", "minimum": 1, "maximum": 20}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
NAMED = {"name": "seen", "schema": SCHEMA, "strict": True}


def is_json(text: str) -> bool:
    found = json.loads(text)
    return set(found) == {"colour", "count"} and found["colour"] in ("red", "green") and 1 <= found["count"] <= 20


def is_object(text: str) -> bool:
    return isinstance(json.loads(text), dict)


def is_digits(text: str) -> bool:
    return re.fullmatch("[0-9]{3}", text) is not None


def is_choice(text: str) -> bool:
    return text in ("yes", "no")


GRAMMAR = 'start: "yes" | "no"'
ASKED: dict[str, tuple[dict[str, Any], Any]] = {
    "OpenAI's schema": ({"response_format": {"type": "json_schema", "json_schema": NAMED}}, is_json),
    "a loose schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": False}}},
        is_json,
    ),
    "vLLM's schema": ({"structured_outputs": {"json": SCHEMA}}, is_json),
    "a schema as text": ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, is_json),
    "vLLM's older schema": ({"guided_json": SCHEMA}, is_json),
    "SGLang's schema": ({"json_schema": json.dumps(SCHEMA)}, is_json),
    "vLLM's expression": ({"structured_outputs": {"regex": "[0-9]{3}"}}, is_digits),
    "SGLang's expression": ({"regex": "[0-9]{3}"}, is_digits),
    "vLLM's older expression": ({"guided_regex": "[0-9]{3}"}, is_digits),
    "vLLM's choice": ({"structured_outputs": {"choice": ["yes", "no"]}}, is_choice),
    "vLLM's older choice": ({"guided_choice": ["yes", "no"]}, is_choice),
    "vLLM's grammar": ({"structured_outputs": {"grammar": GRAMMAR}}, is_choice),
    "vLLM's older grammar": ({"guided_grammar": GRAMMAR}, is_choice),
    "SGLang's grammar": ({"ebnf": 'root ::= "yes" | "no"'}, is_choice),
    "beside what asks for nothing": (
        {"response_format": {"type": "text"}, "structured_outputs": None, "regex": "", "guided_choice": ["yes", "no"]},
        is_choice,
    ),
}


@pytest.mark.parametrize("name", ASKED)
def test_every_spelling_is_honoured(name: str, server: RunningServer) -> None:
    fields, matches = ASKED[name]
    answer = server.post(chat("What is it?", max_tokens=100, temperature=1.0, seed=7, **fields))
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "stop"
    assert matches(choice["message"]["content"]), choice
    assert "x-siglane-ignored" not in {header.lower() for header in answer.headers}


def test_some_object_is_one(server: RunningServer) -> None:
    """A random model may not end it: what there is begins one."""
    fields: dict[str, Any] = {"response_format": {"type": "json_object"}}
    (choice,) = server.post(chat("x", max_tokens=60, **fields)).json()["choices"]
    text = choice["message"]["content"]
    assert text.startswith("{")
    assert choice["finish_reason"] == "length" or is_object(text)


def test_a_picture_streamed_and_in_several_choices(server: RunningServer) -> None:
    fields = {"structured_outputs": {"json": SCHEMA}, "n": 3, "temperature": 1.0, "seed": 3, "max_tokens": 200}
    body = chat(image_part(picture()), "What is it?", logprobs=True, top_logprobs=2, **fields)
    whole = server.post(body).json()
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert all(map(is_json, texts))
    assert all(choice["logprobs"]["content"] for choice in whole["choices"])
    streamed = [""] * 3
    for chunk in stream(server, body).chunks:
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content") or ""
    assert streamed == texts


def test_a_stop_string_still_ends_it(server: RunningServer) -> None:
    answer = server.post(chat("x", structured_outputs={"choice": ["yes, no"]}, stop=[","], max_tokens=50)).json()
    assert answer["choices"][0]["message"]["content"] == "yes"


class Seen(BaseModel):
    """What the openai client makes a schema of."""

    colour: Literal["red", "green"]
    count: Literal[1, 2, 3]


def test_the_openai_client_parses_what_it_gets(server: RunningServer) -> None:
    answer = server.openai().chat.completions.parse(
        model="tiny", messages=[{"role": "user", "content": "What is it?"}], response_format=Seen, max_tokens=200
    )
    assert isinstance(answer.choices[0].message.parsed, Seen)


def schema_of(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}


SCHEMA_FIELD = "response_format.json_schema.schema"
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no schema": ({"response_format": {"type": "json_schema"}}, "invalid_value", "response_format.json_schema"),
    "a schema without a reason": (
        {"response_format": {"type": "json_object", "json_schema": NAMED}},
        "invalid_value",
        "response_format.json_schema",
    ),
    "no such type": ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
    "structural tags": ({"response_format": {"type": "structural_tag"}}, "invalid_value", "response_format.type"),
    "SGLang's tags": ({"structural_tag": "{}"}, "unsupported_field", "structural_tag"),
    "a wrong type": (schema_of({"type": "objct"}), "invalid_json_schema", SCHEMA_FIELD),
    "a keyword": (schema_of({"not": {}}), "invalid_json_schema", SCHEMA_FIELD),
    "a ring": (schema_of({"$ref": "#"}), "invalid_json_schema", SCHEMA_FIELD),
    "a host": (schema_of({"$ref": "http://127.0.0.1:1/"}), "invalid_json_schema", SCHEMA_FIELD),
    "an old keyword": (schema_of({"divisibleBy": 2}), "invalid_json_schema", SCHEMA_FIELD),
    "a NUL": ({"structured_outputs": {"regex": "a\0"}}, "invalid_regex", "structured_outputs.regex"),
    "looking ahead": ({"structured_outputs": {"regex": "(?=a)a"}}, "invalid_regex", "structured_outputs.regex"),
    "SGLang's bad expression": ({"regex": "("}, "invalid_regex", "regex"),
    "no expression": ({"regex": 3}, "invalid_value", "regex"),
    "no choices": ({"structured_outputs": {"choice": []}}, "invalid_value", "structured_outputs.choice"),
    "no texts": ({"guided_choice": ["a", 3]}, "invalid_value", "guided_choice"),
    "a bad grammar": ({"structured_outputs": {"grammar": "?"}}, "invalid_grammar", "structured_outputs.grammar"),
    "nothing": ({"structured_outputs": {}}, "invalid_value", "structured_outputs"),
    "two at once": ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "invalid_value", "structured_outputs"),
    "two fields": ({"regex": "a", "structured_outputs": {"choice": ["a"]}}, "invalid_value", "regex"),
    "a chain of schemas": (
        schema_of({"$ref": "#/$defs/0", "$defs": {str(n): {"$ref": f"#/$defs/{n + 1}"} for n in range(6000)}}),
        "invalid_json_schema",
        SCHEMA_FIELD,
    ),
    "brackets": ({"regex": "(" * 50_000 + ")" * 50_000}, "invalid_regex", "regex"),
    "white space": (
        {"structured_outputs": {"json": {}, "disable_any_whitespace": True}},
        "unsupported_field",
        "structured_outputs.disable_any_whitespace",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_names_its_field(name: str, server: RunningServer) -> None:
    fields, code, param = REFUSED[name]
    assert_error(server.post(chat("x", **fields)), 400, code, param)
