"""JSON schemas that answers can be held to: the groups of JSON-Schema-Test-Suite's draft 2020-12 that the automaton
knows, written anew, and fifty as applications have them."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def closed(required: int | None = None, **properties: Any) -> Schema:
    """An object of these properties and no others; of which the first so many are required, or all."""
    names = [*properties]
    return {
        "type": "object", "properties": properties, "required": names[:required], "additionalProperties": False,
    }  # fmt: skip


TEXT: Schema = {"type": "string", "maxLength": 8}
INTEGER: Schema = {"type": "integer"}
FLAG: Schema = {"type": "boolean"}
NOTHING: Schema = {"type": "null"}


def some(items: Any, least: int = 0, most: int = 3) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


GROUPS: dict[str, list[Schema]] = {
    "additionalProperties": [
        {"type": "object", "properties": {"foo": INTEGER, "bar": {}}, "additionalProperties": False},
        {"type": "object", "properties": {"foo": INTEGER}, "additionalProperties": FLAG},
        {"type": "object", "additionalProperties": {"enum": [1, 2]}},
        {"type": "object", "properties": {"foo": TEXT}, "patternProperties": {"^v": NOTHING},
         "additionalProperties": False},
        {"type": "object", "additionalProperties": False},
        {"type": "object", "properties": {"a": FLAG}, "additionalProperties": some(INTEGER)},
    ],
    "allOf": [
        {"allOf": [{"type": "integer"}, {"minimum": 3}]},
        {"allOf": [closed(bar=INTEGER) | {"additionalProperties": True}, {"required": ["bar"]}]},
        {"allOf": [{"type": "string"}, {"maxLength": 4}, {"minLength": 2}]},
        {"properties": {"a": INTEGER}, "type": "object", "allOf": [{"properties": {"b": TEXT}, "required": ["b"]}]},
        {"allOf": [{"maximum": 30}, {"minimum": 20}], "type": "integer"},
        {"allOf": [True, {"type": "boolean"}]},
        {"allOf": [{}], "type": "null"},
        {"allOf": [{"allOf": [{"type": "null"}]}]},
        {"allOf": [{"enum": [1, 2, 3]}, {"enum": [2, 3, 4]}]},
    ],
    "anyOf": [
        {"anyOf": [INTEGER, {"minimum": 2, "type": "number"}]},
        {"type": "string", "anyOf": [{"maxLength": 2}, {"minLength": 4}]},
        {"anyOf": [closed(bar=INTEGER), closed(foo=TEXT)]},
        {"anyOf": [{"type": "number"}, {}]},
        {"anyOf": [{"anyOf": [NOTHING]}]},
        {"anyOf": [False, FLAG]},
        {"anyOf": [some(INTEGER), {"const": "none"}]},
    ],
    "boolean_schema": [{"properties": {"a": True}, "type": "object"},
     {"items": True, "type": "array", "maxItems": 2}],
    "const": [
        {"const": 2}, {"const": {"foo": "bar", "baz": "bax"}}, {"const": [{"foo": "bar"}]}, {"const": None},
        {"const": False}, {"const": [False]}, {"const": {"a": False}}, {"const": 0}, {"const": 1.5},
        {"const": -2.0},
        {"const": "hello\u2028there"}, {"const": 9007199254740992}, {"const": ""}, {"const": {}}, {"const": []},
    ],
    "default": [
        {"type": "object", "properties": {"foo": {"type": "integer", "default": []}}},
        {"type": "object", "properties": {"alpha": {"type": "number", "maximum": 3, "default": 5}}},
    ],
    "defs": [
        {"$defs": {"a": INTEGER}, "$ref": "#/$defs/a"},
        {"$defs": {"foo": {"$defs": {"bar": TEXT}, "$ref": "#/$defs/foo/$defs/bar"}}, "$ref": "#/$defs/foo"},
    ],
    "enum": [
        {"enum": [1, 2, 3]}, {"enum": [6, "foo", [], True, {"foo": 12}]}, {"enum": [6, None]}, {"enum": [False]},
        {"enum": [[False]]}, {"enum": [True, 1.0]}, {"enum": ["foo\nbar", "foo\rbar"]}, {"enum": [0, -0.5, 1e3]},
        closed(foo={"enum": ["foo"]}, bar={"enum": ["bar"]}), {"type": "string", "enum": ["a", 1, "b"]},
    ],
    "exclusiveMaximum": [
        {"type": "number", "exclusiveMaximum": 3.0}, {"type": "integer", "exclusiveMaximum": 0},
        {"type": "number", "minimum": 1, "exclusiveMaximum": 1.5},
    ],
    "exclusiveMinimum": [
        {"type": "number", "exclusiveMinimum": 1.1}, {"type": "integer", "exclusiveMinimum": -3},
        {"type": "integer", "exclusiveMinimum": 4, "maximum": 5},
    ],
    "format": [
        {"type": "string", "format": name}
        for name in ("date", "time", "date-time", "email", "uuid", "ipv4", "ipv6", "hostname", "duration", "uri")
    ],
    "infinite-loop-detection": [
        {"$defs": {"int": INTEGER}, "type": "object", "allOf": [
            {"properties": {"foo": {"$ref": "#/$defs/int"}}},
            {"properties": {"foo": {"minimum": 0}}, "required": ["foo"]}]},
    ],
    "items": [
        {"type": "array", "items": INTEGER, "maxItems": 4}, {"type": "array", "items": False},
        {"type": "array", "items": some(some(INTEGER, most=2), most=2), "maxItems": 2},
        {"type": "array", "prefixItems": [{}], "items": INTEGER, "maxItems": 3},
        {"type": "array", "prefixItems": [{}, {}, {}], "items": False},
        {"type": "array", "prefixItems": [TEXT], "items": NOTHING, "minItems": 1, "maxItems": 3},
        {"type": "array", "items": {"type": "null"}, "maxItems": 5},
    ],
    "maxItems": [{"type": "array", "maxItems": 2}],
    "maxLength": [{"type": "string", "maxLength": 2}, {"type": "string", "maxLength": 0}],
    "maxProperties": [
        {"type": "object", "maxProperties": 2, "additionalProperties": FLAG},
        {"type": "object", "maxProperties": 0},
    ],
    "maximum": [
        {"type": "number", "maximum": 3.0}, {"type": "integer", "maximum": 300},
        {"type": "number", "maximum": -0.25},
        {"type": "integer", "maximum": 2.5},
    ],
    "minItems": [{"type": "array", "minItems": 1, "maxItems": 3}, some(INTEGER, 2, 2),
     some(some(FLAG, 1, 1), 1, 2)],
    "minLength": [{"type": "string", "minLength": 2}, {"type": "string", "minLength": 3, "maxLength": 3}],
    "minProperties": [
        {"type": "object", "minProperties": 1, "additionalProperties": INTEGER},
        {"type": "object", "minProperties": 2, "maxProperties": 2, "additionalProperties": NOTHING},
    ],
    "minimum": [
        {"type": "number", "minimum": 1.1}, {"type": "integer", "minimum": -2}, {"type": "number", "minimum": -2.0},
        {"type": "integer", "minimum": 0, "maximum": 0}, {"type": "integer", "minimum": 99, "maximum": 1001},
        {"type": "number", "minimum": 0.1, "maximum": 0.2},
    ],
    "multipleOf": [
        {"type": "integer", "multipleOf": 2}, {"type": "integer", "multipleOf": 7, "minimum": 1},
        {"type": "number", "multipleOf": 0.5}, {"type": "integer", "multipleOf": 10, "minimum": 10, "maximum": 40},
    ],
    "oneOf": [
        {"oneOf": [INTEGER, TEXT]}, {"oneOf": [closed(bar=INTEGER), closed(foo=TEXT)]},
        {"oneOf": [NOTHING, FLAG, some(INTEGER)]}, {"oneOf": [{"const": "a"}, {"const": "b"}]},
        {"oneOf": [closed(kind={"const": "x"}, x=INTEGER), closed(kind={"const": "y"}, y=TEXT)]},
        {"oneOf": [{"type": "null"}]}, {"oneOf": [{"oneOf": [NOTHING]}]},
    ],
    "pattern": [
        {"type": "string", "pattern": "^a*$"}, {"type": "string", "pattern": "^\\p{Lu}[a-z]{1,3}$"},
        {"type": "string", "pattern": "^[A-Z]{2}-\\d{3}$"}, {"type": "string", "pattern": "^(red|green|blue)$"},
        {"type": "string", "pattern": "^\\S{2,4}$"},
        {"type": "string", "pattern": "^(\\([0-9]{3}\\))?[0-9]{3}-[0-9]{4}$"},
        {"type": "string", "pattern": "^é+$"}, {"type": "string", "pattern": "^\\w{1,5}$"},
    ],
    "patternProperties": [
        {"type": "object", "patternProperties": {"^f.{0,3}o$": INTEGER}, "additionalProperties": False},
        {"type": "object", "patternProperties": {"^a": FLAG}, "additionalProperties": False, "minProperties": 1},
        {"type": "object", "properties": {"id": TEXT}, "required": ["id"], "patternProperties": {"^x-": NOTHING},
         "additionalProperties": False},
    ],
    "prefixItems": [
        {"type": "array", "prefixItems": [INTEGER, TEXT], "maxItems": 3, "items": FLAG},
        {"type": "array", "prefixItems": [FLAG, False], "items": False},
        {"type": "array", "prefixItems": [INTEGER], "minItems": 1, "maxItems": 2},
        {"type": "array", "prefixItems": [NOTHING, NOTHING], "items": False, "minItems": 2},
    ],
    "properties": [
        {"type": "object", "properties": {"foo": INTEGER, "bar": TEXT}},
        {"type": "object", "properties": {"foo": some(FLAG, 0, 2), "bar": some({}, 0, 1)},
         "additionalProperties": INTEGER},
        closed(**{"foo\nbar": INTEGER, 'foo"bar': INTEGER, "foo\\bar": INTEGER, "foo\tbar": INTEGER}),
        closed(__proto__=INTEGER, toString=closed(length=TEXT), constructor=INTEGER),
        closed(foo=NOTHING), closed(0, foo=NOTHING, bar=FLAG),
    ],
    "ref": [
        {"type": "object", "properties": {"foo": {"$ref": "#"}}, "additionalProperties": False},
        {"type": "object", "properties": {"foo": INTEGER, "bar": {"$ref": "#/properties/foo"}}, "required": ["bar"],
         "additionalProperties": False},
        {"type": "array", "prefixItems": [INTEGER, {"$ref": "#/prefixItems/0"}], "items": False, "minItems": 2},
        {"$defs": {"tilde~field": INTEGER, "slash/field": INTEGER, "percent%field": INTEGER}, **closed(
            tilde={"$ref": "#/$defs/tilde~0field"}, slash={"$ref": "#/$defs/slash~1field"})},
        {"$defs": {"a": INTEGER, "b": {"$ref": "#/$defs/a"}, "c": {"$ref": "#/$defs/b"}}, "$ref": "#/$defs/c"},
        {"$defs": {"list": some(INTEGER)}, "$ref": "#/$defs/list", "maxItems": 2},
        closed(**{"$ref": TEXT}),
        {"$defs": {"yes": True}, "type": "array", "items": {"$ref": "#/$defs/yes"}, "maxItems": 1},
        {"$defs": {"node": closed(1, value=INTEGER, sub={"$ref": "#/$defs/node"})}, "$ref": "#/$defs/node"},
        {"$defs": {'foo"bar': INTEGER}, **closed(x={"$ref": "#/$defs/foo%22bar"})},
    ],
    "required": [
        {"type": "object", "properties": {"foo": {}, "bar": {}}, "required": ["foo"],
         "additionalProperties": False},
        {"type": "object", "properties": {"foo": {}}, "required": [], "additionalProperties": False},
        {"type": "object", "required": ["foo"], "additionalProperties": INTEGER},
        closed(**{"foo\nbar": FLAG, "é": FLAG}),
    ],
    "type": [
        {"type": "integer"}, {"type": "number"}, {"type": "string"}, {"type": "object"}, {"type": "array"},
        {"type": "boolean"}, {"type": "null"}, {"type": ["integer", "string"]}, {"type": ["string"]},
        {"type": ["array", "object"]}, {"type": ["array", "object", "null"]},
    ],
}  # fmt: skip

BOX: Schema = some(INTEGER | {"minimum": 0, "maximum": 4096}, 4, 4)
COLOURS = {"enum": ["red", "green", "blue", None]}
TREE: Schema = {
    "$defs": {"node": closed(label=TEXT, children=some({"$ref": "#/$defs/node"}, 0, 2))}, "$ref": "#/$defs/node",
}  # fmt: skip
MONEY: Schema = {"type": "string", "pattern": "^\\d{1,5}\\.\\d{2}$"}
DATE: Schema = {"type": "string", "format": "date"}

OWN: list[Schema] = [
    closed(caption=TEXT), closed(labels=some({"enum": ["cat", "dog", "bird"]}, 1)),
    closed(objects=some(closed(label=TEXT, box=BOX), 0, 2)),
    closed(colour=COLOURS), closed(count=INTEGER | {"minimum": 0, "maximum": 99}, certain=FLAG),
    closed(answer={"enum": ["yes", "no"]}, because=TEXT),
    closed(total=MONEY, currency={"enum": ["CHF", "EUR", "USD"]}),
    closed(vendor=TEXT, date=DATE, lines=some(closed(what=TEXT, price=MONEY), 1, 2)),
    closed(1, name=TEXT, email={"type": "string", "format": "email"}), TREE,
    closed(depth=INTEGER, tree=some(some(TEXT), 0, 1)),
    {"$defs": TREE["$defs"], **closed(left={"$ref": "#/$defs/node"}, right={"$ref": "#/$defs/node"})},
    closed(**{"Größe": INTEGER, "色": TEXT, "😀": FLAG}), {"enum": ["größer", "色", "😀", "a\u0301", "\\n", "\n"]},
    closed(text={"type": "string", "pattern": "^[\u3040-\u309f]{1,4}$"}),
    some(some(some(INTEGER, 1, 1), 1, 1), 1, 1),
    closed(a=closed(b=closed(c=closed(d=closed(e=FLAG))))), closed(rows=some(some(TEXT, 2, 2), 1, 2)),
    {"type": "array", "prefixItems": [TEXT, INTEGER, FLAG], "items": False, "minItems": 3},
    {"anyOf": [closed(found={"const": True}, box=BOX), closed(found={"const": False})]},
    closed(shape={"oneOf": [closed(kind={"const": "circle"}, r=INTEGER), closed(kind={"const": "box"}, box=BOX)]}),
    closed(score={"type": "number", "minimum": 0, "maximum": 1}),
    closed(when={"type": "string", "format": "date-time"}),
    closed(0, a=INTEGER, b=INTEGER, c=INTEGER, d=INTEGER),
    closed(maybe={"type": ["string", "null"], "maxLength": 5}),
    closed(tags=some(TEXT | {"minLength": 1}, 1, 4)),
    closed(page={"type": "integer", "minimum": 1}, of={"type": "integer", "minimum": 1}),
    {"$defs": {"colour": COLOURS}, **closed(fore={"$ref": "#/$defs/colour"}, back={"$ref": "#/$defs/colour"})},
    {"type": "object", "patternProperties": {"^[a-z]{2}$": TEXT}, "additionalProperties": False,
     "minProperties": 1, "maxProperties": 2},
    closed(id={"type": "string", "format": "uuid"}),
    closed(plate={"type": "string", "pattern": "^[A-Z]{2} \\d{1,6}$"}),
    closed(version={"type": "string", "pattern": "^\\d+\\.\\d+\\.\\d+$"}),
    closed(quote={"const": 'she said "no" \\ went'}),
    closed(rgb=some(INTEGER | {"minimum": 0, "maximum": 255}, 3, 3)), {"anyOf": [TEXT, INTEGER, FLAG, NOTHING]},
    some({"anyOf": [closed(say=TEXT), closed(look=INTEGER)]}, 1, 2),
    closed(linked={"anyOf": [{"$ref": "#"}, NOTHING]}),
    {"title": "Seen", "description": "what is seen",
     **closed(what=TEXT | {"description": "a word", "examples": ["x"]})},
    closed(celsius={"type": "number", "minimum": -273.15, "maximum": 6000}),
    closed(angle={"type": "integer", "multipleOf": 45, "minimum": 0, "maximum": 315}),
    closed(**{f"field_{number}": INTEGER | {"minimum": 0, "maximum": 9} for number in range(20)}),
    {"enum": [*range(300)]},
    {"enum": [f"class {number}" for number in range(200)]},
    closed(host={"type": "string", "format": "hostname"}, port={"type": "integer", "minimum": 1, "maximum": 65535}),
    closed(steps=some(closed(1, do={"enum": ["click", "type", "wait"]}, x=INTEGER, y=INTEGER), 1, 2)),
    closed(table=closed(head=some(TEXT, 1, 2),
     rows=some(some({"type": ["string", "number", "null"], "maxLength": 3}, 1, 2), 0, 2))),
    {"allOf": [{"$ref": "#/$defs/named"},
     {"properties": {"age": {"type": "integer", "minimum": 0}}, "required": ["age"]}],
     "$defs": {"named": {"type": "object", "properties": {"name": TEXT}, "required": ["name"]}}},
    closed(lang={"type": "string", "pattern": "^(de|fr|it|en)(-[A-Z]{2})?$"}),
    closed(empty={"const": ""}, none={"type": "null"}, no={"const": []}),
    closed(grid=some(some({"enum": [0, 1]}, 3, 3), 3, 3)), closed(ean={"type": "string", "pattern": "^[0-9]{13}$"}),
]  # fmt: skip
