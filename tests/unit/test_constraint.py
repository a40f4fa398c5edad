"""Answers held to a JSON schema, a regular expression or a grammar: what a random model may write under them, and what
is refused."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_schemas import GROUPS, OWN
from scripted_checkpoint import write_calling_checkpoint, write_scripted_checkpoint
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from siglane import LLM, Constraint, SamplingParams, UserError
from siglane.config.vlm import Thinking
from siglane.engine.answers.thinking import ThinkingStart
from siglane.engine.constraints import constraint
from siglane.engine.constraints.constraint import (
    MOST_CHARACTERS,
    MOST_GRAMMARS,
    Constrained,
    Grammars,
    check_constraint,
)
from siglane.engine.constraints.tokens import grammar_tokens
from siglane.errors import EngineError
from siglane.families.processor import Processor, load_processor
from siglane.weights.demo import open_model
from siglane.weights.hub import open_checkpoint

MOST_TOKENS = 3000
OPTIONS = ["a blue square", "a green circle", 'a "quoted" word', "äß\n語", "a\\b"]

NUMBERS: list[dict[str, Any]] = [
    {"type": "integer"},
    {"type": "number"},
    {"type": "integer", "minimum": 3, "maximum": 7},
    {"type": "integer", "exclusiveMinimum": -20, "exclusiveMaximum": 5},
    {"type": "integer", "minimum": 1000, "maximum": 123456},
    {"type": "integer", "multipleOf": 5},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "minimum": -0.5, "exclusiveMaximum": 2.25},
    {"type": ["integer", "null"]},
    {"type": "integer", "minimum": 10},
    {"type": "integer", "maximum": -10},
    {"enum": [1, 2.5, -3, 10**12]},
    {"const": -7},
]
TEXTS: list[dict[str, Any]] = [
    {"type": "string"},
    {"type": "string", "maxLength": 3},
    {"type": "string", "minLength": 2, "maxLength": 4},
    {"type": "string", "minLength": 5},
    {"type": "string", "pattern": "^[a-c]+$"},
    {"type": "string", "pattern": "^(a+)+b$"},
    {"type": "string", "pattern": "^\\d{4}-\\d{2}$"},
    {"type": "string", "pattern": "^[^\\x00-\\x1f]{0,5}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "time"},
    {"type": "string", "format": "email"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "hostname"},
    {"enum": ["red", "green", "blue"]},
    {"enum": ["ä", "語", "😀", "", '"', "\\", "a\nb"]},
    {"const": "same"},
]
LISTS: list[dict[str, Any]] = [
    {"type": "array"},
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False, "minItems": 2},
    {"type": "array", "prefixItems": [{"const": 1}], "items": {"type": "null"}},
    {"type": "array", "items": {"type": "array", "items": {"type": "integer"}, "maxItems": 2}, "maxItems": 2},
    {"type": "array", "maxItems": 0},
    {"items": {"type": "integer"}, "type": "array", "minItems": 1},
]
OBJECTS: list[dict[str, Any]] = [
    {"type": "object"},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["b"]},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"type": "object", "patternProperties": {"^x_": {"type": "boolean"}}, "additionalProperties": False},
    {"type": "object", "minProperties": 2, "additionalProperties": {"type": "null"}},
    {"type": "object", "maxProperties": 1, "additionalProperties": {"type": "null"}},
    {"type": "object", "properties": {"ключ": {"const": "значение"}, "": {"type": "null"}}, "required": ["ключ", ""]},
    {"type": "object", "properties": {"$ref": {"type": "string", "maxLength": 3}}, "required": ["$ref"]},
    {"type": "object", "properties": {"a": {}, "b": True}, "required": ["a", "b"], "additionalProperties": False},
    {"const": {"a": [1, {"b": None}]}},
    {"enum": [{"a": 1}, [2], "three", 4, True, None]},
]
COMPOSED: list[dict[str, Any]] = [
    {},
    {"type": "boolean"},
    {"type": "null"},
    {"type": ["string", "integer", "null"]},
    {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 2}]},
    {"oneOf": [{"type": "integer"}, {"type": "boolean"}]},
    {"allOf": [{"type": "integer"}, {"minimum": 5}, {"maximum": 9}]},
    {
        "oneOf": [
            {"type": "object", "properties": {"kind": {"const": "a"}, "x": {"type": "integer"}}, "required": ["kind"]},
            {"type": "object", "properties": {"kind": {"const": "b"}, "y": {"type": "string"}}, "required": ["kind"]},
        ]
    },
    {"$defs": {"n": {"type": "integer"}}, "type": "array", "items": {"$ref": "#/$defs/n"}},
    {"definitions": {"a/b": {"enum": [1]}}, "$ref": "#/definitions/a~1b"},
    {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 4},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
                },
                "required": ["name"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/tree",
    },
    {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["next"]},
    {
        "title": "Picture",
        "description": "what is seen",
        "type": "object",
        "properties": {
            "objects": {
                "type": "array",
                "minItems": 1,
                "maxItems": 3,
                "items": {
                    "type": "object",
                    "properties": {
                        "label": {"type": "string", "minLength": 1, "maxLength": 12},
                        "box": {"type": "array", "items": {"type": "integer"}, "minItems": 4, "maxItems": 4},
                        "colour": {"enum": ["red", "green", "blue", None]},
                    },
                    "required": ["label", "box", "colour"],
                    "additionalProperties": False,
                },
            },
            "certain": {"type": "boolean", "default": True, "examples": [False]},
        },
        "required": ["objects", "certain"],
        "additionalProperties": False,
    },
]
KNOWN = NUMBERS + TEXTS + LISTS + OBJECTS + COMPOSED
GENERATED = 150


@cache
def demo() -> tuple[Grammars, Processor]:
    processor = load_processor(open_model("demo"))
    return Grammars(processor.tokenizer, processor.config.language.vocab_size, processor.eos_token_ids), processor


@pytest.fixture
def processor() -> Processor:
    return demo()[1]


@pytest.fixture
def grammars() -> Grammars:
    return demo()[0]


def written(constraint: Constraint, grammars: Grammars, processor: Processor, seed: int) -> str:
    """What a model says that likes every token as much as another, and ends more and more."""
    rng = np.random.default_rng(seed)
    constrained = grammars.start(constraint, None, "closed")
    ends = np.zeros(processor.config.language.vocab_size)
    closing = processor.tokenizer.encode('"}]', add_special_tokens=False)
    ends[[*closing, *(number for text in '"]},.@' for number in _ids(processor.tokenizer, text))]] = 0.02
    ends[list(processor.eos_token_ids)] = 0.05
    said: list[int] = []
    for place in range(MOST_TOKENS):
        bits = constrained.allowed()
        assert bits is not None
        assert bits.any()
        scores = rng.gumbel(size=len(bits)) + place * ends
        token_id = int(np.where(bits, scores, -np.inf).argmax())
        if token_id in processor.eos_token_ids:
            return str(processor.tokenizer.decode(said))
        said.append(token_id)
        constrained.append(token_id)
    raise AssertionError(f"no end: {processor.tokenizer.decode(said)[:200]}")


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return found if len(found) == 1 else []


def check_schema(schema: dict[str, Any], grammars: Grammars, processor: Processor, seeds: range) -> None:
    asked = Constraint.json_schema(schema)
    check_constraint(asked)
    validator = jsonschema_rs.validator_for({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})
    for seed in seeds:
        text = written(asked, grammars, processor, seed)
        assert validator.is_valid(json.loads(text, parse_float=finite)), (schema, text)


def finite(text: str) -> float:
    """JSON's numbers have no limit, Python's do."""
    return min(max(float(text), -sys.float_info.max), sys.float_info.max)


@pytest.mark.parametrize("schema", KNOWN, ids=lambda schema: json.dumps(schema)[:40])
def test_whatever_a_model_writes_matches_the_schema(
    schema: dict[str, Any], grammars: Grammars, processor: Processor
) -> None:
    check_schema(schema, grammars, processor, range(3))


@pytest.mark.parametrize("group", [*GROUPS, "own"])
def test_the_groups_of_the_standards_tests(group: str, grammars: Grammars, processor: Processor) -> None:
    for schema in GROUPS.get(group, OWN):
        check_schema(schema, grammars, processor, range(3))


def test_there_are_two_hundred_of_them() -> None:
    assert len(OWN) >= 50
    assert sum(map(len, GROUPS.values())) + len(OWN) >= 200


LAYOUTS: list[dict[str, Any]] = [{"separators": (",", ":")}, {}, {"indent": 2}]


def test_an_answer_that_matches_by_itself_is_held_to_nothing_else(grammars: Grammars, processor: Processor) -> None:
    """Token by token, as the tokenizer cuts it: greedy, a model says under a schema what it would have said."""
    for schema in [schema for group in (*GROUPS.values(), OWN) for schema in group]:
        asked = Constraint.json_schema(schema)
        value = json.loads(written(asked, grammars, processor, 0), parse_float=finite)
        for text in {json.dumps(value, ensure_ascii=False, **layout): None for layout in LAYOUTS}:
            constrained = grammars.start(asked, None, "closed")
            for token_id in (*processor.tokenizer.encode(text, add_special_tokens=False), processor.eos_token_ids[0]):
                bits = constrained.allowed()
                assert bits is not None
                assert bits[token_id], (schema, text, token_id)
                constrained.append(token_id)


NAMES = st.sampled_from(["a", "b", "name", "ü", "語", "x y", '"', "$id"])
LEAVES = st.sampled_from([*NUMBERS, *TEXTS, {"type": "boolean"}, {"type": "null"}])


def objects_of(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    @st.composite
    def one(draw: Callable[..., Any]) -> dict[str, Any]:
        properties = draw(st.dictionaries(NAMES, inner, min_size=1, max_size=4))
        required = [name for name in properties if draw(st.booleans())]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    return one()


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        objects_of(inner),
        st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 3)),
        st.builds(lambda one: {"anyOf": [one, {"type": "null"}]}, inner),
    ),
    max_leaves=6,
)


@settings(max_examples=GENERATED, deadline=None, derandomize=True, database=None)
@given(SCHEMAS, st.booleans())
def test_nested_schemas_by_name_or_in_place(schema: dict[str, Any], by_name: bool) -> None:
    grammars, processor = demo()
    whole = {"$defs": {"one": schema}, "type": "array", "items": {"$ref": "#/$defs/one"}, "maxItems": 2}
    check_schema(whole if by_name else schema, grammars, processor, range(1))


@pytest.mark.parametrize(
    "pattern", ["a (red|blue) [a-z]+", "(a+)+b", "a{1,100000}", "[äöü]{2}|語", ".{3}", "(yes|no)\n"]
)
def test_regular_expressions(pattern: str, grammars: Grammars, processor: Processor) -> None:
    check_constraint(Constraint("regex", pattern))
    if "100000" in pattern:  # a random walk ends it at every token as likely as another
        assert set(written(Constraint("regex", "a{1,50}"), grammars, processor, 0)) == {"a"}
        return
    for seed in range(3):
        assert re.fullmatch(pattern, written(Constraint("regex", pattern), grammars, processor, seed))


def test_choices_letter_by_letter(grammars: Grammars, processor: Processor) -> None:
    found = {written(Constraint.choice(OPTIONS), grammars, processor, seed) for seed in range(60)}
    assert found == set(OPTIONS)


@pytest.mark.parametrize("grammar", ['start: "yes" | "no"', 'root ::= "yes" | "no"', "start: /yes|no/"])
def test_grammars_in_both_notations(grammar: str, grammars: Grammars, processor: Processor) -> None:
    check_constraint(Constraint("lark", grammar))
    assert {written(Constraint("lark", grammar), grammars, processor, seed) for seed in range(20)} == {"yes", "no"}


TAGS = ("<tool_call>", "<think>", "<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize("special", [True, False])
def test_a_text_that_is_a_token_s_name_is_spelled(special: bool, tmp_path: Path) -> None:
    """llguidance cuts a forced text into tokens and would allow that token alone, which it does not take."""
    write_calling_checkpoint(tmp_path / "caller", special=special)
    processor = load_processor(open_checkpoint(tmp_path / "caller"))
    grammars = Grammars(processor.tokenizer, processor.config.language.vocab_size, processor.eos_token_ids)
    for tag in TAGS:
        asked = (
            Constraint("lark", f'start: "{tag}" "a"'),
            Constraint("regex", f"{re.escape(tag)}a"),
            Constraint.choice([f"{tag}a"]),
            Constraint.json_schema({"const": f"{tag}a"}),
        )
        for one in asked:
            check_constraint(one)
            said = written(one, grammars, processor, 0)
            assert said == (json.dumps(f"{tag}a") if one.kind == "json_schema" else f"{tag}a")


def test_so_it_is_where_they_lie_in_the_vocabulary(grammars: Grammars, processor: Processor) -> None:
    names = [token.content for token in processor.tokenizer.added_tokens_decoder.values()]
    assert "<|im_end|>" in names
    for name in names:
        assert written(Constraint.choice([name]), grammars, processor, 0) == name


@pytest.mark.parametrize("special", [True, False])
def test_and_in_one_of_scored_pieces(special: bool) -> None:
    letters = [(letter, -2.0) for letter in "<>s/abu▁"]
    pieces = Tokenizer(models.Unigram([("<unk>", 0.0), ("<s>", 0.0), *letters], unk_id=0))
    pieces.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    pieces.add_tokens([AddedToken(text, special=special) for text in ("<unk>", "<s>", "<a>")])
    tokens = grammar_tokens(PreTrainedTokenizerFast(tokenizer_object=pieces), 20, [1])
    found = ["", "<s>", *("<>s/abu"), " ", "<a>"]
    for number in (2, 3, 4, 6, 7):
        assert tokens.decode_str([number]) == found[number]
    for number in (1, 10):
        assert tokens.is_special_token(number)
    assert tokens.tokenize_str("<a>s") == [2, 6, 3, 4]


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


REFUSED: dict[str, tuple[Constraint, str, str]] = {
    "a keyword": (Constraint.json_schema({"not": {"type": "string"}}), "invalid_json_schema", "not"),
    "an inner keyword": (
        Constraint.json_schema({"properties": {"a": {"type": "array", "uniqueItems": True}}}),
        "invalid_json_schema",
        "uniqueItems",
    ),
    "conditions": (Constraint.json_schema({"if": {"type": "string"}, "then": {}}), "invalid_json_schema", "if"),
    "a format": (Constraint.json_schema({"type": "string", "format": "shoe size"}), "invalid_json_schema", "shoe size"),
    "an old keyword": (
        Constraint.json_schema({"items": {"allOf": [{"type": "integer", "divisibleBy": 2}]}}),
        "invalid_json_schema",
        "divisibleBy",
    ),
    "the automaton's own": (Constraint.json_schema({"x-guidance": {"lenient": True}}), "invalid_json_schema", "x-gui"),
    "a type": (Constraint.json_schema({"type": "objct"}), "invalid_json_schema", "objct"),
    "two ways at once": (
        Constraint.json_schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}),
        "invalid_json_schema",
        "oneOf",
    ),
    "a ring": (Constraint.json_schema({"$ref": "#"}), "invalid_json_schema", "no answer"),
    "a longer ring": (
        Constraint.json_schema(
            {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
        ),
        "invalid_json_schema",
        "no answer",
    ),
    "an object that holds itself": (
        Constraint.json_schema({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
        "invalid_json_schema",
        "no answer",
    ),
    "a list that holds itself, either way": (
        Constraint.json_schema(
            {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#"}], "$defs": {"a": {"type": "array", "minItems": 1}}}
            | {"$defs": {"a": {"type": "array", "minItems": 1, "items": {"allOf": [{"$ref": "#"}]}}}}
        ),
        "invalid_json_schema",
        "no answer",
    ),
    "another host": (Constraint.json_schema({"$ref": "http://127.0.0.1:9/a.json"}), "invalid_json_schema", "127.0.0.1"),
    "a file": (Constraint.json_schema({"$ref": "file:///etc/passwd"}), "invalid_json_schema", "file"),
    "nothing there": (Constraint.json_schema({"$ref": "#/$defs/none"}), "invalid_json_schema", "none"),
    "two hundred levels": (Constraint.json_schema(nested(200)), "invalid_json_schema", "recursion"),
    "no JSON": (Constraint("json_schema", "{"), "invalid_json_schema", "JSON"),
    "a list": (Constraint("json_schema", "[]"), "invalid_json_schema", "object"),
    "deep JSON": (Constraint("json_schema", "[" * 100_000), "invalid_json_schema", "JSON"),
    "nothing to choose": (Constraint.json_schema({"enum": []}), "invalid_json_schema", "empty"),
    "what cannot be": (
        Constraint.json_schema({"allOf": [{"type": "string"}, {"type": "number"}]}),
        "invalid_json_schema",
        "incompatible",
    ),
    "a hundred thousand values": (
        Constraint.json_schema({"enum": [f"value {number}" for number in range(100_000)]}),
        "invalid_json_schema",
        str(MOST_CHARACTERS),
    ),
    "a NUL in a schema": (Constraint.json_schema({"const": "\0"}), "invalid_json_schema", "NUL"),
    "a NUL": (Constraint("regex", "a\0"), "invalid_regex", "NUL"),
    "an open group": (Constraint("regex", "("), "invalid_regex", "unclosed group"),
    "looking ahead": (Constraint("regex", "(?=a)b"), "invalid_regex", "look-around"),
    "looking behind": (Constraint("regex", "(?<!a)b"), "invalid_regex", "look-around"),
    "going back": (Constraint("regex", "(a)\\1"), "invalid_regex", "backreferences"),
    "a long expression": (Constraint("regex", "a" * (MOST_CHARACTERS + 1)), "invalid_regex", str(MOST_CHARACTERS)),
    "a rule that is not there": (Constraint("lark", "start: x"), "invalid_grammar", "x"),
    "a token's name": (Constraint("lark", "start: <|im_end|>"), "invalid_grammar", 'token: "<|im_end|>"'),
    "no start": (Constraint("lark", 'other: "x"'), "invalid_grammar", "start"),
    "no grammar": (Constraint("lark", "???"), "invalid_grammar", "grammar"),
    "half of the other notation": (Constraint("lark", "root ::= ("), "invalid_grammar", "grammar"),
    "long in the other notation": (Constraint("lark", "root ::= " + '"a" ' * 9999), "invalid_grammar", "characters"),
}


CHAIN = [*range(6000)]
DEEP: dict[str, Constraint] = {
    "schemas that name each other": Constraint.json_schema(
        {
            "$defs": {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in CHAIN} | {"a6000": {"type": "string"}},
            "$ref": "#/$defs/a0",
        }
    ),
    "rules that name each other": Constraint(
        "lark", "start: a0\n" + "\n".join(f"a{n}: a{n + 1}" for n in CHAIN) + '\na6000: "x"'
    ),
    "brackets in an expression": Constraint("regex", "(" * 50_000 + "a" + ")" * 50_000),
    "brackets in a grammar": Constraint("lark", "start: " + "(" * 50_000 + '"a"' + ")" * 50_000),
    "brackets in the other notation": Constraint("lark", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000),
}


@pytest.mark.parametrize("name", DEEP)
def test_what_nests_too_deep_ends_no_process_of_ours(name: str) -> None:
    """Some are compiled by a process whose stack they overrun; the next one is answered by another."""
    with pytest.raises(UserError) as refused:
        check_constraint(DEEP[name])
    assert refused.value.code.startswith("invalid_")
    check_constraint(Constraint("regex", "a+"))


def test_what_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraint, "TRIAL_SECONDS", 1e-6)
    with pytest.raises(UserError) as refused:
        check_constraint(Constraint.json_schema({"enum": [f"value {number}" for number in range(10_000)]}))
    assert refused.value.code == "grammar_timeout"


def test_a_place_that_is_no_schema_is_not_said_to_be_endless() -> None:
    check_constraint(Constraint.json_schema({"$ref": "#/shared/one", "shared": {"one": {"type": "integer"}}}))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(name: str) -> None:
    constraint, code, words = REFUSED[name]
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        check_constraint(constraint)
    assert refused.value.code == code
    assert "\n" not in str(refused.value)


def test_a_schema_of_ten_thousand_values_is_read(grammars: Grammars, processor: Processor) -> None:
    values = [f"value {number}" for number in range(10_000)]
    check_constraint(Constraint.json_schema({"enum": values}))
    assert json.loads(written(Constraint.json_schema({"enum": values}), grammars, processor, 0)) in values


def test_compiled_grammars_are_bounded(grammars: Grammars) -> None:
    for number in range(MOST_GRAMMARS + 5):
        grammars.start(Constraint("regex", f"a{{{number + 1}}}"), None, "closed")
    assert len(grammars._compiled) == MOST_GRAMMARS


def start(
    grammars: Grammars, pattern: str, thinking: Thinking | None = None, begins: ThinkingStart = "closed"
) -> Constrained:
    return grammars.start(Constraint("regex", pattern), thinking, begins)


def test_guesses_are_looked_at_and_leave_no_trace(grammars: Grammars, processor: Processor) -> None:
    (a,), (b,) = _ids(processor.tokenizer, "a"), _ids(processor.tokenizer, "b")
    constrained = start(grammars, "ab{2}a")
    before = constrained.allowed()
    behind = constrained.allowed((a, b))
    assert before is not None
    assert behind is not None
    assert before[a]
    assert not before[b]
    assert behind[b]
    assert not behind[a]
    assert constrained.allowed((a, a)) is None
    assert constrained.allowed((b,)) is None
    again = constrained.allowed()
    assert again is not None
    assert (again == before).all()
    for token_id in (a, b, b, a):
        constrained.append(token_id)
    end = constrained.allowed()
    assert end is not None
    assert np.flatnonzero(end).tolist() == list(processor.eos_token_ids)


def test_thinking_is_free(grammars: Grammars, processor: Processor) -> None:
    (a,), (b,) = _ids(processor.tokenizer, "a"), _ids(processor.tokenizer, "b")
    thinking = Thinking(start=400, end=401, forced=(401,))
    opened = start(grammars, "a", thinking, "opened")
    assert opened.allowed() is None
    assert opened.allowed((b, b)) is None
    behind = opened.allowed((b, 401))
    assert behind is not None
    assert behind[a]
    assert behind.sum() <= 2
    for token_id in (b, 401, a):
        opened.append(token_id)
    end = opened.allowed()
    assert end is not None
    assert np.flatnonzero(end).tolist() == list(processor.eos_token_ids)
    free = start(grammars, "a", thinking, "free")
    first = free.allowed()
    assert first is not None
    assert first[400]
    assert first[a]
    assert not first[b]
    free.append(400)
    assert free.allowed() is None
    at_once = start(grammars, "a", thinking, "free")
    at_once.append(a)
    after = at_once.allowed()
    assert after is not None
    assert not after[400]


def test_a_grammar_that_outgrows_its_allowance_ends_its_answer(grammars: Grammars, processor: Processor) -> None:
    (a,), (b,) = _ids(processor.tokenizer, "a"), _ids(processor.tokenizer, "b")
    rng = random.Random(0)
    constrained = start(grammars, "(.*a.{60}b.{60}a.*){30}")

    def write() -> None:
        for _ in range(4000):
            constrained.allowed()
            constrained.append(rng.choice((a, b)))

    with pytest.raises(EngineError, match="too complex") as ended:
        write()
    assert (ended.value.code, ended.value.status) == ("grammar_too_complex", 400)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo", device="cpu", threads=1)


def said(llm: LLM, constraint: Constraint | None, prompt: str = "Hello", **sampling: Any) -> list[str]:
    params = SamplingParams(**{"max_tokens": 40, **sampling}, constraint=constraint)
    (generation,) = llm.generate([prompt], params, errors="raise")
    return [output.text for output in generation.outputs]


def test_what_matches_by_itself_stays_the_same(llm: LLM) -> None:
    (free,) = said(llm, None)
    assert free
    assert said(llm, Constraint("regex", "(?s:.*)")) == [free]
    assert said(llm, Constraint.choice([free, "another"])) == [free]


def test_sampled_answers_match_and_repeat(llm: LLM) -> None:
    fields = {"temperature": 1.5, "seed": 5, "n": 4}
    first = said(llm, Constraint("regex", "[0-9]{4}"), **fields)
    assert all(re.fullmatch("[0-9]{4}", text) for text in first)
    assert len(set(first)) > 1
    assert said(llm, Constraint("regex", "[0-9]{4}"), **fields) == first
    assert said(llm, Constraint("regex", "[0-9]{4}"), **fields, num_speculative_tokens=8) == first


def test_guessing_ahead_changes_nothing(llm: LLM) -> None:
    constraint = Constraint("regex", "(abc ){12}end")
    (plain,) = said(llm, constraint, "abc abc abc abc", max_tokens=60)
    assert plain == "abc " * 12 + "end"
    assert said(llm, constraint, "abc abc abc abc", max_tokens=60, num_speculative_tokens=8) == [plain]


def test_the_end_of_a_grammar_ends_the_answer(llm: LLM) -> None:
    for fields in ({"ignore_eos": True}, {"min_tokens": 30}, {"logit_bias": ((65, -100.0),)}):
        assert said(llm, Constraint.choice(["yes", "no"]), **fields)[0] in ("yes", "no")


def test_penalties_and_a_bias_choose_among_what_matches(llm: LLM) -> None:
    tokenizer = llm.processor.tokenizer
    (first,) = said(llm, Constraint("regex", "[ab]"))
    (other,) = {"a", "b"} - {first}
    (token_id,) = _ids(tokenizer, other)
    assert said(llm, Constraint("regex", "[ab]"), logit_bias=((token_id, 100.0),)) == [other]


def test_neighbours_of_a_constrained_answer_do_not_change(llm: LLM) -> None:
    prompts = ["Hello", "What is this?", "Hello"]
    params = [SamplingParams(max_tokens=12) for _ in prompts]
    alone = [row.outputs[0].text for row in llm.generate(prompts, params)]
    params[1] = SamplingParams(max_tokens=12, constraint=Constraint.json_object())
    beside = [row.outputs[0].text for row in llm.generate(prompts, params)]
    assert [beside[0], beside[2]] == [alone[0], alone[2]]
    assert beside[1].startswith("{")


def test_a_bad_one_is_its_own_row_s_error(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=4), SamplingParams(max_tokens=4, constraint=Constraint("regex", "("))]
    good, bad = llm.generate(["Hello", "Hello"], params)
    assert good.error is None
    assert isinstance(bad.error, UserError)
    assert bad.error.code == "invalid_regex"


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder: Path = tmp_path_factory.mktemp("thinker") / "scripted"
    write_scripted_checkpoint(folder)
    return LLM(str(folder), device="cpu", threads=1)


def test_a_thinking_model_thinks_first(thinker: LLM) -> None:
    params = SamplingParams(max_tokens=40, constraint=Constraint.choice(["zebra", "yes"]))
    (row,) = thinker.generate(["Hello"], params, errors="raise", chat_template_kwargs={"enable_thinking": True})
    assert row.outputs[0].reasoning == "abcde"
    assert row.outputs[0].text in ("zebra", "yes")
    (row,) = thinker.generate(["Hello"], params, errors="raise", chat_template_kwargs={"enable_thinking": False})
    assert not row.outputs[0].reasoning
    assert row.outputs[0].text in ("zebra", "yes")
