"""What a caller writes, read: OpenAI's messages, and the images and videos that they or a prompt name.

A Python caller's dictionaries come as they are, a client's once `server/protocol.py` has checked them. A refusal is
read as the text of its answer; a tool's calls and results become `Message.tool_calls` and turns of the role `tool`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

from siglane.errors import UserError, blaming
from siglane.media.item import MediaItem
from siglane.tiling.rule import LIMITS, ImageBudget
from siglane.types import Detail, ImagePart, Message, Role, ToolCall

ChatMessage = Mapping[str, Any]

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
NEVER_READ = {"reasoning_content", "reasoning", "annotations"}  # of earlier answers, which clients send back whole
MESSAGE_KEYS = NEVER_READ | {
    "role",
    "content",
    "name",
    "refusal",
    "audio",
    "tool_calls",
    "tool_call_id",
    "function_call",
}
BUDGET_KEYS = frozenset({"detail", *LIMITS})
PART_TYPES = "text, image_url, image, video_url, video or refusal"


class Conversation(NamedTuple):
    """One prompt. media: its images and videos, numbered together through all messages."""

    messages: tuple[Message, ...]
    media: tuple[MediaItem, ...]


def read_messages(messages: Sequence[ChatMessage]) -> Conversation:
    """UserError names the message or part at fault, as `messages[0].content[1]`."""
    media: list[MediaItem] = []
    turns = [_turn(message, f"messages[{number}]", media) for number, message in enumerate(messages)]
    if not turns:
        raise UserError("the conversation has no messages", code="invalid_prompt", param="messages")
    return Conversation(tuple(turns), tuple(media))


def _turn(message: ChatMessage, where: str, media: list[MediaItem]) -> Message:
    check_keys(message, MESSAGE_KEYS, where)
    role, content, refusal = message.get("role"), message.get("content"), message.get("refusal")
    if role not in ROLES:
        raise UserError(f"{where}: role {role!r} is not one of {', '.join(ROLES)}", code="invalid_prompt", param=where)
    if message.get("audio"):
        text = f"{where}: audio is not read; send what was said as text"
        raise UserError(text, code="unsupported_field", param=f"{where}.audio")
    calls = _tool_calls(message, where)
    if calls and role != "assistant":
        text = f"{where}: tools are called by the assistant, not by {role!r}"
        raise UserError(text, code="invalid_prompt", param=f"{where}.tool_calls")
    if (content is None and ROLES[role] in ("assistant", "tool")) or (content == "" and calls):
        content = ()  # an assistant that only called tools or refused, a function without a result
    if isinstance(content, str):
        parts: list[str | ImagePart] = [content]
    elif isinstance(content, list | tuple):
        parts = [_part(part, f"{where}.content[{number}]", media) for number, part in enumerate(content)]
    else:
        raise UserError(f"{where}: content must be a text or a list of parts", code="invalid_prompt", param=where)
    if refusal:
        parts.append(_text(refusal, f"{where}.refusal"))
    called = _text(message.get("tool_call_id"), f"{where}.tool_call_id")
    name = _text(message.get("name"), f"{where}.name") if ROLES[role] == "tool" else ""
    return Message(ROLES[role], tuple(parts), calls, called, name)


def _tool_calls(message: ChatMessage, where: str) -> tuple[ToolCall, ...]:
    """Of `tool_calls`, and of `function_call`, their older form."""
    calls, old = message.get("tool_calls") or (), message.get("function_call")
    if not isinstance(calls, list | tuple):
        raise UserError(f"{where}: tool_calls must be a list", code="invalid_prompt", param=f"{where}.tool_calls")
    named = [(call, f"{where}.tool_calls[{number}]") for number, call in enumerate(calls)]
    found = [_tool_call(call, place) for call, place in named]
    return (*found, _function(old, f"{where}.function_call")) if old is not None else tuple(found)


def _tool_call(call: Any, where: str) -> ToolCall:
    check_keys(call, {"id", "type", "function", "index"}, where)
    return _function(call.get("function"), f"{where}.function", _text(call.get("id"), f"{where}.id"))


def _function(given: Any, where: str, call_id: str = "") -> ToolCall:
    check_keys(given, {"name", "arguments"}, where)
    name, arguments = given.get("name"), given.get("arguments")
    if isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(name, str):
        raise UserError(f"{where}: name must be a text", code="invalid_prompt", param=f"{where}.name")
    return ToolCall(name, _text(arguments, f"{where}.arguments"), call_id)


def _text(given: object, where: str) -> str:
    """None is as good as absent."""
    if given is not None and not isinstance(given, str):
        raise UserError(f"{where} must be a text", code="invalid_prompt", param=where)
    return given or ""


def _part(part: Any, where: str, media: list[MediaItem]) -> str | ImagePart:
    kind = part.get("type") if isinstance(part, Mapping) else None
    match kind:
        case "text" | "input_text" | "output_text" | "refusal":
            key = "refusal" if kind == "refusal" else "text"
            check_keys(part, {"type", key, *(("annotations",) if kind == "output_text" else ())}, where)
            if not isinstance(part.get(key), str):
                raise UserError(f"{where}: {key} must be a text", code="invalid_prompt", param=where)
            return str(part[key])
        case "image_url" | "video_url":
            check_keys(part, {"type", kind}, where)
            media.append(url_item(part.get(kind), where, video=kind == "video_url"))
        case "image":
            media.append(image_item({key: value for key, value in part.items() if key != "type"}, where))
        case "video":
            media.append(video_item({key: value for key, value in part.items() if key != "type"}, where))
        case _:
            message = f"{where}: a part is of type {PART_TYPES}, got {kind!r}"
            raise UserError(message, code="unsupported_content_type", param=where)
    return ImagePart(len(media) - 1)


def image_item(given: object, param: str, key: str = "image") -> MediaItem:
    """An image source, or a dictionary `{key: source}` with limits."""
    if not isinstance(given, Mapping):
        return MediaItem(given, param)
    check_keys(given, {key, *BUDGET_KEYS}, param)
    return MediaItem(given.get(key), param, read_limits(given, param))


def video_item(given: object, param: str, key: str = "video") -> MediaItem:
    """A video source, or a dictionary `{key: source}` with `num_frames` and limits."""
    if not isinstance(given, Mapping):
        return MediaItem(given, param, video=True)
    check_keys(given, {key, "num_frames", *BUDGET_KEYS}, param)
    frames = given.get("num_frames")
    if frames is not None and not _is_int(frames):
        raise UserError(f"{param}: num_frames must be a number", code="invalid_prompt", param=param)
    return MediaItem(given.get(key), param, read_limits(given, param), video=True, frames=frames)


def url_item(given: object, param: str, *, video: bool = False) -> MediaItem:
    """What stands in OpenAI's `image_url` or `video_url`: a URL, or a dictionary `{"url": URL}` as above."""
    item = video_item(given, param, "url") if video else image_item(given, param, "url")
    if not isinstance(item.source, str):
        raise UserError(f"{param}: url must be a text", code="invalid_prompt", param=param)
    return item


def read_limits(fields: Mapping[str, Any], param: str) -> ImageBudget:
    """The limits among the keys of a dictionary; None is as good as absent. UserError names the value at fault."""
    found = {name: fields[name] for name in BUDGET_KEYS if fields.get(name) is not None}
    for name, value in found.items():
        if name == "detail":
            fits, expected = value in get_args(Detail), f"one of {', '.join(get_args(Detail))}"
        elif name == "grid_pinpoints":
            fits, expected = _are_pairs(value), "pairs of height and width"
        else:
            fits, expected = _is_int(value), "a number"
        if not fits:
            raise UserError(f"{param}: {name} must be {expected}, got {value!r}", code="invalid_prompt", param=param)
    if "grid_pinpoints" in found:
        found["grid_pinpoints"] = tuple((height, width) for height, width in found["grid_pinpoints"])
    with blaming(param):
        return ImageBudget(**found)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_pairs(value: object) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(map(_is_int, pair)) for pair in value
    )


def check_keys(found: Any, known: set[str], param: str) -> None:
    if not isinstance(found, Mapping):
        raise UserError(f"{param} must be a dictionary, got {type(found).__name__}", code="invalid_prompt", param=param)
    unknown = sorted(map(str, found.keys() - known))
    if unknown:
        message = f"{param}: key {unknown[0]!r} is not known; siglane reads {', '.join(sorted(known))}"
        raise UserError(message, code="invalid_prompt", param=param)
