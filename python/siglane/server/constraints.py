"""The fields of a chat request that say what its answer has to match, in the spellings of OpenAI, vLLM and SGLang."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from siglane.errors import UserError
from siglane.server.fields import RequestModel, one_of
from siglane.types import Constraint

KINDS = ("json", "json_object", "regex", "choice", "grammar")
MAX_CHOICES = 10_000
MAX_CHOICE_CHARACTERS = 1024
Schema = dict[str, Any]
SchemaOrText = Annotated[
    Annotated[Schema, Tag("#schema")] | Annotated[str, Tag("#text")],
    Discriminator(lambda given: "#text" if isinstance(given, str) else "#schema"),
]
Choice = Annotated[str, Field(min_length=1, max_length=MAX_CHOICE_CHARACTERS)]


class AskedConstraint(NamedTuple):
    """param: the field that asks for it."""

    param: str
    constraint: Constraint


class JsonSchemaFormat(RequestModel):
    """strict: answers match the schema whether it is set or not."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[Schema, Field(alias="schema")]
    strict: bool | None = None


_WITHOUT_SCHEMA: dict[str, Any] = {
    "properties": {"type": {"enum": ["text", "json_object"]}, "json_schema": {"type": "null"}}
}
_WITH_SCHEMA: dict[str, Any] = {
    "required": ["json_schema"],
    "properties": {"type": {"const": "json_schema"}, "json_schema": {"not": {"type": "null"}}},
}


class ResponseFormat(RequestModel):
    """OpenAI's. json_schema: exactly where the type says so."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [_WITHOUT_SCHEMA, _WITH_SCHEMA]})

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            message = "json_schema belongs to the type 'json_schema', which needs it"
            raise UserError(message, code="invalid_value", param="json_schema")
        return self

    def asked(self, param: str) -> AskedConstraint | None:
        if self.type == "text":
            return None
        if self.json_schema is None:
            return AskedConstraint(param, Constraint.json_object())
        return AskedConstraint(f"{param}.json_schema.schema", Constraint.json_schema(self.json_schema.schema_))


class StructuredOutputs(RequestModel):
    """vLLM's: exactly one of these."""

    model_config = ConfigDict(json_schema_extra=one_of(*KINDS))

    json_: Annotated[SchemaOrText | None, Field(alias="json")] = None
    json_object: Literal[True] | None = None
    regex: Annotated[str, Field(min_length=1)] | None = None
    choice: Annotated[list[Choice], Field(min_length=1, max_length=MAX_CHOICES)] | None = None
    grammar: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _check(self) -> StructuredOutputs:
        named = [name for name, value in self._values().items() if value is not None]
        if len(named) != 1:
            message = f"exactly one of {', '.join(KINDS)} is to be named, not {' and '.join(named) or 'none'}"
            raise UserError(message, code="invalid_value")
        for name in ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern", "structural_tag"):
            if (self.model_extra or {}).get(name):
                message = f"{name} is not supported by this server"
                raise UserError(message, code="unsupported_field", param=name)
        return self

    def asked(self, param: str) -> AskedConstraint:
        name, value = next((name, value) for name, value in self._values().items() if value is not None)
        return AskedConstraint(f"{param}.{name}", READERS[name](value))

    def _values(self) -> dict[str, Any]:
        values = (self.json_, self.json_object, self.regex, self.choice, self.grammar)
        return dict(zip(KINDS, values, strict=True))


def _json(value: Schema | str) -> Constraint:
    return Constraint("json_schema", value) if isinstance(value, str) else Constraint.json_schema(value)


READERS: Mapping[str, Callable[[Any], Constraint]] = {
    "json": _json,
    "json_object": lambda _: Constraint.json_object(),
    "regex": lambda value: Constraint("regex", value),
    "choice": Constraint.choice,
    "grammar": lambda value: Constraint("lark", value),
}
# a field's older name, or SGLang's, and the kind that it states
OTHER_NAMES: Mapping[str, str] = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "regex": "regex",
    "ebnf": "grammar",
}


def asked_constraint(
    response_format: ResponseFormat | None, structured_outputs: StructuredOutputs | None, extra: Mapping[str, Any]
) -> AskedConstraint | None:
    """What the fields ask for, at most one of them and of `OTHER_NAMES` in `extra`. UserError when several ask, or one
    with another name is not of its kind."""
    found: list[AskedConstraint | None] = []
    if response_format is not None:
        found.append(response_format.asked("response_format"))
    if structured_outputs is not None:
        found.append(structured_outputs.asked("structured_outputs"))
    found += [_by_another_name(name, kind, extra[name]) for name, kind in OTHER_NAMES.items() if extra.get(name)]
    asking = [one for one in found if one is not None]
    if len(asking) > 1:
        message = f"{asking[0].param} asks already for what the answer has to match; send one of the two"
        raise UserError(message, code="invalid_value", param=asking[1].param)
    return asking[0] if asking else None


def _by_another_name(name: str, kind: str, value: Any) -> AskedConstraint:
    texts = isinstance(value, list) and all(isinstance(one, str) and one for one in value)
    fits = {"json": isinstance(value, dict | str), "choice": texts and len(value) <= MAX_CHOICES}
    if not fits.get(kind, isinstance(value, str)):
        what = {"json": "a JSON schema", "choice": f"a list of at most {MAX_CHOICES} texts"}.get(kind, "a text")
        raise UserError(f"{name} must be {what}", code="invalid_value", param=name)
    return AskedConstraint(name, READERS[kind](value))
