"""OpenAI's messages in front of decisions, read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from siglane.errors import UserError
from siglane.media.item import MediaItem
from siglane.media.messages import ROLES, Conversation, check_keys, url_item
from siglane.types import ImagePart, Message

TEXTS = ("input_text", "output_text", "text")


def read_input(messages: Sequence[Any]) -> Conversation:
    """UserError names the message or part at fault, as `input[0].content[1]`."""
    media: list[MediaItem] = []
    turns = [_turn(message, f"input[{number}]", media) for number, message in enumerate(messages)]
    return Conversation(tuple(turns), tuple(media))


def _turn(message: Any, where: str, media: list[MediaItem]) -> Message:
    check_keys(message, {"type", "role", "content", "phase"}, where)
    role, content = message.get("role"), message.get("content")
    if message.get("type") not in (None, "message") or role not in ("user", "system", "developer", "assistant"):
        text = f"{where}: a message of the user, the system, the developer or the assistant is read"
        raise UserError(text, code="unsupported_content_type", param=where)
    if isinstance(content, str):
        content = [{"type": "input_text", "text": content}]
    if not isinstance(content, list) or not content:
        raise UserError(f"{where}: content must be a text or a list of parts", code="invalid_value", param=where)
    parts = [_part(part, f"{where}.content[{number}]", role, media) for number, part in enumerate(content)]
    return Message(ROLES[role], tuple(parts))


def _part(part: Any, where: str, role: str, media: list[MediaItem]) -> str | ImagePart:
    check_keys(part, {"type", "text", "image_url", "detail", "prompt_cache_breakpoint"}, where)
    kind, text, url = part.get("type"), part.get("text"), part.get("image_url")
    if kind in TEXTS and isinstance(text, str):
        return text
    if kind in ("input_image", "image_url") and role == "user" and url is not None:
        fields = dict(url) if isinstance(url, dict) else {"url": url}
        if part.get("detail") is not None:
            fields["detail"] = part["detail"]
        media.append(url_item(fields, where))
        return ImagePart(len(media) - 1)
    message = f"{where}: a part is a text, or an image of a user's message"
    raise UserError(message, code="unsupported_content_type", param=where)
