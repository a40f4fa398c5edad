"""What of a JSON schema has to be known before it is compiled: its keywords, and whether any answer to it ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# of earlier drafts, which the automaton would pass over, and its own
IGNORED_KEYWORDS = frozenset({"additionalItems", "disallow", "divisibleBy", "extends", "x-guidance"})
BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
SINGLE = ("items", "additionalProperties", "contains", "not", "propertyNames", "if", "then", "else")


def ignored_keyword(schema: dict[str, Any]) -> str | None:
    """The first keyword that would have no effect."""
    return next((name for one in subschemas(schema) for name in one if name in IGNORED_KEYWORDS), None)


def subschemas(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schema and all below it; not what only looks like one, such as a constant."""
    waiting: list[Any] = [schema]
    while waiting:
        one = waiting.pop()
        if not isinstance(one, dict):
            continue
        yield one
        for name in BY_NAME:
            if isinstance(found := one.get(name), dict):
                waiting += found.values()
        for name in LISTS:
            if isinstance(found := one.get(name), list):
                waiting += found
        waiting += [one[name] for name in SINGLE if name in one]


def never_ends(schema: dict[str, Any]) -> bool:
    """Whether every answer would have to hold another one that matches the same schema, and so on.

    A schema ends when of each of its conditions one schema does; from those without conditions this is handed on.
    """
    every = {id(one): one for one in subschemas(schema)}
    waiting: dict[int, list[tuple[int, int]]] = {}  # a schema's place: whose condition, and which one, it meets
    open_conditions: dict[int, set[int]] = {}
    for place, one in every.items():
        conditions = [[needed] for needed in _needed(one, schema)] + _ways(one)
        open_conditions[place] = set()
        for number, ways in enumerate(conditions):
            if all(id(way) in every for way in ways):  # elsewhere nothing is known of an end
                open_conditions[place].add(number)
                for way in ways:
                    waiting.setdefault(id(way), []).append((place, number))
    ended = [place for place, left in open_conditions.items() if not left]
    for place in ended:
        for other, number in waiting.get(place, ()):
            if number in open_conditions[other]:
                open_conditions[other].remove(number)
                if not open_conditions[other]:
                    ended.append(other)
    return bool(open_conditions[id(schema)])


def _needed(one: dict[str, Any], whole: dict[str, Any]) -> list[Any]:
    """Schemas that an answer to this one has to match as well, or to hold answers to."""
    needed = [_target(whole, one["$ref"])] if isinstance(one.get("$ref"), str) else []
    needed += one["allOf"] if isinstance(one.get("allOf"), list) else []
    required, properties = one.get("required"), one.get("properties")
    if one.get("type") == "object" and isinstance(required, list) and isinstance(properties, dict):
        needed += [properties[name] for name in required if isinstance(name, str) and name in properties]
    least = one.get("minItems")
    if one.get("type") == "array" and isinstance(least, int):
        first = one["prefixItems"] if isinstance(one.get("prefixItems"), list) else []
        needed += first[:least] + ([one.get("items")] if least > len(first) else [])
    return needed


def _ways(one: dict[str, Any]) -> list[list[Any]]:
    """Lists of which an answer has to match some schema."""
    return [one[name] for name in ("anyOf", "oneOf") if isinstance(one.get(name), list)]


def _target(whole: dict[str, Any], reference: str) -> Any:
    """None where it leads elsewhere, which the automaton refuses by itself."""
    found: Any = whole
    if not reference.startswith("#"):
        return None
    for part in reference[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, dict) else None
    return found
