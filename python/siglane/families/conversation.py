"""OpenAI's messages, as a Python caller gives them and as the server has checked them, to what the processor takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from siglane.errors import UserError
from siglane.media.item import MediaItem, check_keys, image_item, url_item, video_item
from siglane.types import ImagePart, Message, Role

ChatMessage = Mapping[str, Any]

ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
PART_TYPES = "text, image_url, image, video_url or video"


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
    check_keys(message, {"role", "content", "reasoning_content"}, where)  # the last as it came; models do not read it
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise UserError(f"{where}: role {role!r} is not one of {', '.join(ROLES)}", code="invalid_prompt", param=where)
    if isinstance(content, str):
        return Message(ROLES[role], (content,))
    if not isinstance(content, list | tuple):
        raise UserError(f"{where}: content must be a text or a list of parts", code="invalid_prompt", param=where)
    parts = (_part(part, f"{where}.content[{number}]", media) for number, part in enumerate(content))
    return Message(ROLES[role], tuple(parts))


def _part(part: Any, where: str, media: list[MediaItem]) -> str | ImagePart:
    kind = part.get("type") if isinstance(part, Mapping) else None
    match kind:
        case "text":
            check_keys(part, {"type", "text"}, where)
            if not isinstance(part.get("text"), str):
                raise UserError(f"{where}: text must be a text", code="invalid_prompt", param=where)
            return str(part["text"])
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
