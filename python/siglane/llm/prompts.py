"""The prompts of `LLM.generate`: a text, with images and videos beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from siglane.errors import UserError
from siglane.media.messages import Conversation, check_keys, image_item, video_item
from siglane.types import ImagePart, Message

PromptLike = str | Mapping[str, Any]


def one_message(row: PromptLike) -> Conversation:
    """One user message, its images first, then its videos."""
    if isinstance(row, str):
        row = {"prompt": row}
    check_keys(row, {"prompt", "images", "videos"}, "a prompt")
    text, images, videos = row.get("prompt"), row.get("images", ()), row.get("videos", ())
    if not isinstance(text, str):
        raise UserError(f"prompt must be a text, got {type(text).__name__}", code="invalid_prompt", param="prompt")
    for name, found in (("images", images), ("videos", videos)):
        if not isinstance(found, list | tuple):
            message = f"{name} must be a list, got {type(found).__name__}"
            raise UserError(message, code="invalid_prompt", param=name)
    media = (
        *(image_item(given, f"images[{number}]") for number, given in enumerate(images)),
        *(video_item(given, f"videos[{number}]") for number, given in enumerate(videos)),
    )
    parts: tuple[str | ImagePart, ...] = (*map(ImagePart, range(len(media))), text)
    return Conversation((Message("user", parts),), media)
