"""What a caller writes, read: OpenAI's tools and how an answer may use them.

A Python caller's dictionaries come as they are, a client's once `server/tool_fields.py` has checked them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from siglane.errors import UserError
from siglane.media.messages import check_keys
from siglane.types import Tool, ToolUse

MOST_TOOLS = 128
DEEPEST = 64  # lists and objects of a schema in each other
NAME = r"^[A-Za-z0-9_.:/-]{1,128}$"


def read_tools(
    tools: Sequence[Mapping[str, Any]] | None,
    choice: str | Mapping[str, Any] | None = None,
    parallel: bool | None = None,
) -> ToolUse | None:
    """None where nothing may be called: the model is not told of the tools then. UserError names the field at fault.

    choice: "auto", "required", "none" or `{"type": "function", "function": {"name": ...}}`; parallel: whether an
    answer may call more than once, as it may where nothing is said.
    """
    found = tuple(_tool(tool, f"tools[{number}]") for number, tool in enumerate(_listed(tools)))
    names = [tool.name for tool in found]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise _wrong(f"there is another function {name!r}", f"tools[{number}].function.name")
    named = _named(choice)
    if choice == "none" or (choice in (None, "auto") and not found):
        return None
    if not found:
        raise _wrong("is only accepted together with tools", "tool_choice")
    if named is not None and named not in names:
        raise _wrong(f"there is no function {named!r} among the tools", "tool_choice")
    callable_ = tuple(tool for tool in found if named in (None, tool.name))
    return ToolUse(found, callable_, required=choice not in (None, "auto"), parallel=parallel is not False)


def _listed(tools: object) -> Sequence[Any]:
    if tools is not None and not isinstance(tools, list | tuple):
        raise _wrong("must be a list", "tools")
    if len(tools or ()) > MOST_TOOLS:
        raise _wrong(f"at most {MOST_TOOLS} are read", "tools")
    return tools or ()


def _tool(tool: Any, where: str) -> Tool:
    check_keys(tool, {"type", "function"}, where)
    if tool.get("type") != "function":
        raise _wrong("must be 'function'; other tools are not read", f"{where}.type")
    function, where = tool.get("function"), f"{where}.function"
    check_keys(function, {"name", "description", "parameters", "strict"}, where)
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise _wrong("must have 1 to 128 of the characters A-Z a-z 0-9 _ . : / -", f"{where}.name")
    if description is not None and not isinstance(description, str):
        raise _wrong("must be a text", f"{where}.description")
    if not isinstance(function.get("strict"), bool | None):
        raise _wrong("must be true or false", f"{where}.strict")
    parameters = _parameters(function.get("parameters"), f"{where}.parameters")
    return Tool(name, description, parameters, bool(function.get("strict")))


def _parameters(schema: Any, where: str) -> Mapping[str, Any] | None:
    if schema is None:
        return None
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise _wrong("must be a JSON schema of the type 'object'", where)
    if depth(schema) > DEEPEST:
        raise _wrong(f"is nested more than {DEEPEST} levels deep", where)
    try:
        json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise _wrong(f"is no JSON ({error})", where) from None
    return schema


def depth(value: Any) -> int:
    """Of lists and objects in each other; counted in layers, so that no depth is too deep to be counted."""
    found, layer = 0, [value]
    while layer := [one for one in layer if isinstance(one, dict | list)]:
        found += 1
        layer = [inner for one in layer for inner in (one.values() if isinstance(one, dict) else one)]
    return found


def _named(choice: Any) -> str | None:
    """The function that has to be called."""
    if choice in (None, "auto", "required", "none"):
        return None
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        message = "must be 'auto', 'required', 'none' or {'type': 'function', 'function': {'name': ...}}"
        raise _wrong(message, "tool_choice")
    return name


def _wrong(what: str, param: str) -> UserError:
    return UserError(f"{param}: {what}", code="invalid_value", param=param)
