"""Fields of a chat request whose values pydantic's types cannot say: what is checked, and what the OpenAPI document
tells of it."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from siglane.errors import UserError

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_LOGIT_BIAS = 1024
MAX_TEMPLATE_KWARGS = 16


class RequestModel(BaseModel):
    # strict: true is not 1 and "1" is not 1; extra: unknown fields are reported, see ignored_fields
    model_config = ConfigDict(strict=True, extra="allow")


def _whole(value: Any) -> Any:
    """16.0 is an integer in JSON, and what clients of languages without integers send."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
Url = Annotated[str, Field(json_schema_extra={"format": "uri"})]


def as_url(value: Any) -> Any:
    """A URL alone stands for an object that has nothing else."""
    return {"url": value} if isinstance(value, str) else value


def of_kinds(what: str, *kinds: str | None) -> BeforeValidator:
    """UserError for an object of another type, before its fields are looked at. what: it is; None: it may have none."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") not in kinds:
            message = f"{what} is of type {', '.join(kind for kind in kinds if kind)}; nothing else is read"
            raise UserError(message, code="unsupported_content_type", param="type")
        return value

    return BeforeValidator(check)


def only(field: str, *others: str) -> dict[str, Any]:
    """A JSON schema: `field` is there and not null, `others` say nothing."""
    silent: dict[str, Any] = {other: {"enum": [None, ""]} for other in others}
    return {"required": [field], "properties": {field: {"not": {"type": "null"}}, **silent}}


def one_of(*fields: str) -> dict[str, Any]:
    """A JSON schema: exactly one of the fields says something."""
    return {"anyOf": [only(field, *(other for other in fields if other != field)) for field in fields]}


def not_both(first: str, second: str) -> dict[str, Any]:
    """A JSON schema: at most one of the fields says something."""
    return {"not": {"allOf": [only(first), only(second)]}}


def needs(**flags: str) -> dict[str, Any]:
    """A JSON schema: each field says something only where its flag is true."""
    return {
        "dependentSchemas": {
            field: {"required": [flag], "properties": {flag: {"const": True}}} for field, flag in flags.items()
        }
    }


TemplateValue = str | int | float | bool | None


def _stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return None
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(stop, str) for stop in stops):
        raise UserError(f"stop must be a string or a list of at most {MAX_STOPS} strings", code="invalid_value")
    if not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        message = f"a stop string has between 1 and {MAX_STOP_CHARACTERS} characters"
        raise UserError(message, code="invalid_value")
    return stops


def _logit_bias(value: Any) -> Any:
    if value is None:
        return None
    for key, bias in _object("logit_bias", value, MAX_LOGIT_BIAS, "token ids").items():
        if not re.fullmatch(r"[0-9]{1,9}", key) or isinstance(bias, bool) or not isinstance(bias, int | float):
            raise UserError("logit_bias must map token ids to numbers", code="invalid_value")
        if not -100 <= bias <= 100:
            raise UserError("a logit bias must be between -100 and 100", code="invalid_value")
    return value


def _template_kwargs(value: Any) -> Any:
    if value is None:
        return None
    given = _object("chat_template_kwargs", value, MAX_TEMPLATE_KWARGS, "values")
    if not all(name.isidentifier() for name in given):
        raise UserError("the names in chat_template_kwargs must be identifiers", code="invalid_value")
    if not all(item is None or isinstance(item, TemplateValue) for item in given.values()):
        raise UserError("the values in chat_template_kwargs must be plain", code="invalid_value")
    return value


def _object(name: str, value: Any, most: int, of: str) -> dict[str, Any]:
    """UserError unless `value` is a JSON object with at most `most` entries."""
    if not isinstance(value, dict) or len(value) > most:
        raise UserError(f"{name} must be an object of at most {most} {of}", code="invalid_value")
    return value


_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
StopStrings = Annotated[
    list[str] | None,
    BeforeValidator(_stops),
    WithJsonSchema({"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOPS}, {"type": "null"}]}),
]
LogitBias = Annotated[
    dict[str, Any] | None,
    BeforeValidator(_logit_bias),
    WithJsonSchema(
        {
            "type": ["object", "null"],
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_LOGIT_BIAS,
        }
    ),
]
TemplateKwargs = Annotated[
    dict[str, Any] | None,
    BeforeValidator(_template_kwargs),
    WithJsonSchema(
        {
            "type": ["object", "null"],
            "propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_]*$"},
            "additionalProperties": {"type": ["string", "number", "boolean", "null"]},
            "maxProperties": MAX_TEMPLATE_KWARGS,
        }
    ),
]
